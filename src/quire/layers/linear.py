"""Linear: a dense layer whose weight is packed when it is built."""

from collections.abc import Sequence

from torch import Tensor

from quire.kernels import Kernels
from quire.kernels.interface import PackedWeight, QuantizedWeight
from quire.layers.norm import RMSNorm
from quire.quantization import METHODS, WeightFormat


class Linear:
    """x [M, K] -> x weight^T + bias [M, N], the weight stored as `dtype`: a float type, or a quantisation of METHODS.

    Several weights [N_i, K] make one layer whose output is theirs side by side. They are copied, so views of a mapped
    file may be given; a bias is float32 whatever the dtype. What comes before a layer is one kernel with it where it
    works row by row: `after_norm`, `after_gate`.
    """

    __slots__ = ("bias", "kernels", "num_inputs", "num_outputs", "packed")

    def __init__(
        self, kernels: Kernels, weights: Sequence[Tensor], bias: Tensor | None, dtype: str | WeightFormat
    ) -> None:
        self.kernels = kernels
        self.num_outputs = sum(weight.shape[0] for weight in weights)
        self.num_inputs = weights[0].shape[1]
        if isinstance(dtype, str) and dtype in METHODS:
            dtype = METHODS[dtype].layers
        self.packed: PackedWeight
        if isinstance(dtype, str):
            self.packed = kernels.pack_linear(weights, dtype)
        else:
            self.packed = kernels.quantize_linear(weights, dtype.bits, dtype.group_size or self.num_inputs)
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.packed, QuantizedWeight):
            return self.kernels.linear_quantized(x, self.packed, self.bias, self.num_outputs)
        return self.kernels.linear(x, self.packed, self.bias, self.num_outputs)

    def after_norm(self, norm: RMSNorm, residual: Tensor, update: Tensor | None) -> Tensor:
        """residual, update [M, K] -> [M, N]: of the norm of the residual stream, after adding the update to it."""
        return self.kernels.rms_norm_linear(
            residual, update, norm.weight, norm.eps, self.packed, self.bias, self.num_outputs
        )

    def after_gate(self, x: Tensor, activation: str) -> Tensor:
        """x [M, 2 K] -> [M, N]: of the activation of the first half times the second."""
        return self.kernels.glu_linear(x, activation, self.packed, self.bias, self.num_outputs)


def output_head(kernels: Kernels, table: Tensor, dtype: str) -> Linear:
    """The layer that makes logits: table [vocab_size, H], which may be the embedding's. A quantisation has its own
    rule for it."""
    return Linear(kernels, [table], None, METHODS[dtype].head if dtype in METHODS else dtype)
