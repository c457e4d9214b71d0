"""Linear: a dense layer whose weight is packed when it is built."""

from collections.abc import Sequence

from torch import Tensor

from quire.kernels import Kernels


class Linear:
    """x [M, K] -> x weight^T + bias [M, N], the weight stored as `dtype`.

    Several weights [N_i, K] make one layer whose output is theirs side by side. They are copied, so views of a mapped
    file may be given; a bias is float32 whatever the dtype.
    """

    __slots__ = ("bias", "kernels", "num_outputs", "packed")

    def __init__(self, kernels: Kernels, weights: Sequence[Tensor], bias: Tensor | None, dtype: str) -> None:
        self.kernels = kernels
        self.num_outputs = sum(weight.shape[0] for weight in weights)
        self.packed = kernels.pack_linear(weights, dtype)
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.packed, self.bias, self.num_outputs)
