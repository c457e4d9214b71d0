"""Linear: a dense layer whose weight was packed when it was built."""

from torch import Tensor

from quire.kernels.gemm import PackedLinear, pack_linear


def linear_for(weight: Tensor, bias: Tensor | None, dtype: str) -> PackedLinear:
    """The layer x [M, K] -> x @ weight.T + bias [M, N], its weight [N, K] stored as `dtype`."""
    return pack_linear(weight, None if bias is None else bias.float(), dtype)
