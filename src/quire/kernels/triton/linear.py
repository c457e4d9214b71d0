"""Dense layers: torch's products (cuBLAS) over weights joined once. Weights of few bits are not there yet."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels.interface import PackedWeight, QuantizedWeight
from quire.kernels.triton.activation import gelu_and_mul, silu_and_mul
from quire.kernels.triton.norm import add_rms_norm, rms_norm


def pack_linear(weights: Sequence[Tensor], dtype: str) -> Tensor:
    """The weights one below the other, on the device of the first."""
    return torch.cat([weight.to(getattr(torch, dtype)) for weight in weights])


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """Computed in the type of the weight; the result has the type of x. A bias of another type is widened or rounded as
    it is added."""
    out = torch.nn.functional.linear(x.to(packed.dtype), packed).to(x.dtype)
    return out if bias is None else out.add_(bias)


def linear_of_norm(
    residual: Tensor,
    update: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    packed: PackedWeight,
    bias: Tensor | None,
    num_outputs: int,
) -> Tensor:
    """Two kernels: the product is cuBLAS's."""
    if isinstance(packed, QuantizedWeight):
        _refuse()
    if update is None:
        return linear(rms_norm(residual, norm_weight, eps), packed, bias, num_outputs)
    return linear(add_rms_norm(update, residual, norm_weight, eps), packed, bias, num_outputs)


def linear_of_gate(x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    """Two kernels, as above."""
    if isinstance(packed, QuantizedWeight):
        _refuse()
    gated = silu_and_mul(x) if activation == "silu" else gelu_and_mul(x, tanh=activation == "gelu_tanh")
    return linear(gated, packed, bias, num_outputs)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    _refuse()


def quantize_linear(weights: Sequence[Tensor], bits: int, group_size: int) -> QuantizedWeight:
    _refuse()


def linear_quantized(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    _refuse()


def gather_rows(packed: Tensor, ids: Tensor) -> Tensor:
    """In the type of the weight, which is that of the activations."""
    return packed.index_select(0, ids)


def gather_rows_quantized(weight: QuantizedWeight, ids: Tensor, num_inputs: int) -> Tensor:
    _refuse()


def _refuse() -> NoReturn:
    raise ConfigError("quantization: the GPU kernels have no int8 or int4 weights yet; leave it out, or run on the CPU")
