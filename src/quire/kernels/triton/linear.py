"""Dense layers: torch's products (cuBLAS) over joined weights. There are no int8 or int4 weights yet."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels.allocation import zeros
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.interface import Allocate, LowBitWeight, QuantizedWeight
from quire.kernels.reference import linear_coded
from quire.kernels.triton.activation import gelu_and_mul, silu_and_mul
from quire.kernels.triton.norm import add_rms_norm, rms_norm
from quire.kernels.unfused import unfused
from quire.quantization import WeightFormat


def pack_linear(weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
    """The weights one below the other, on the device of the first."""
    return torch.cat([weight.to(getattr(torch, dtype)) for weight in weights])


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """Computed in the type of the weight; the result has the type of x. A bias of another type is converted to it."""
    out = torch.nn.functional.linear(x.to(packed.dtype), packed).to(x.dtype)
    return out if bias is None else out.add_(bias)


def quantize_linear(weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros) -> QuantizedWeight:
    _refuse()


def pack_blocks(matrices: Sequence[BlockMatrix]) -> LowBitWeight:
    """Blocks are dequantised before they reach a device."""
    _refuse()


def linear_quantized(x: Tensor, weight: LowBitWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    _refuse()


rms_norm_linear, glu_linear, activation_linear = unfused(
    rms_norm, add_rms_norm, silu_and_mul, gelu_and_mul, linear, linear_quantized, linear_coded
)


def gather_rows(packed: Tensor, ids: Tensor, num_inputs: int) -> Tensor:
    """In the type of the weight, which is that of the activations."""
    return packed.index_select(0, ids)


def gather_rows_quantized(weight: LowBitWeight, ids: Tensor, num_inputs: int) -> Tensor:
    _refuse()


def _refuse() -> NoReturn:
    raise ConfigError("quantization: the GPU kernels have no int8 or int4 weights yet; leave it out, or run on the CPU")
