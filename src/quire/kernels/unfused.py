"""`layer_norm`, and operations before a dense layer, for kernel modules that compute one operation after the other."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels.coded import CodedWeight
from quire.kernels.gates import ACTIVATIONS
from quire.kernels.interface import LowBitWeight, PackedWeight


def layer_norm(residual: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """residual, update [T, H] -> [T, H]: each row of the residual shifted to mean 0 and scaled to variance 1, times the
    weight [H], plus the bias [H]. An update is first added to the residual in place."""
    if update is not None:
        residual += update
    dtype = residual.dtype  # torch wants the weight in the type of its input
    shift = None if bias is None else bias.to(dtype)
    return torch.layer_norm(residual, weight.shape, weight.to(dtype), shift, eps)


class RMSNormLinear(Protocol):
    def __call__(
        self,
        residual: Tensor,
        update: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        packed: PackedWeight,
        bias: Tensor | None,
        num_outputs: int,
    ) -> Tensor: ...


class ActivatedLinear(Protocol):
    def __call__(
        self, x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int
    ) -> Tensor: ...


def unfused(
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    silu_and_mul: Callable[[Tensor], Tensor],
    gelu_and_mul: Callable[[Tensor, bool], Tensor],
    linear: Callable[[Tensor, Tensor, Tensor | None, int], Tensor],
    linear_quantized: Callable[[Tensor, LowBitWeight, Tensor | None, int], Tensor],
    linear_coded: Callable[[Tensor, CodedWeight, Tensor | None, int], Tensor],
) -> tuple[RMSNormLinear, ActivatedLinear, ActivatedLinear]:
    """The three operations, made of a module's own. What they compute:

    `rms_norm_linear`: residual, update [M, K], norm_weight [K] -> [M, N], the dense layer of the residual's norm. An
    update is first added to the residual in place. `glu_linear`: x [M, 2 K] -> [M, N], the dense layer of the first
    half's activation (silu, gelu or gelu_tanh) times the second half. `activation_linear`: x [M, K] -> [M, N], the
    dense layer of the activation of x.
    """

    def product(x: Tensor, packed: PackedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
        if isinstance(packed, Tensor):
            return linear(x, packed, bias, num_outputs)
        if isinstance(packed, CodedWeight):
            return linear_coded(x, packed, bias, num_outputs)
        return linear_quantized(x, packed, bias, num_outputs)

    def rms_norm_linear(
        residual: Tensor,
        update: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        packed: PackedWeight,
        bias: Tensor | None,
        num_outputs: int,
    ) -> Tensor:
        if update is None:
            return product(rms_norm(residual, norm_weight, eps), packed, bias, num_outputs)
        return product(add_rms_norm(update, residual, norm_weight, eps), packed, bias, num_outputs)

    def glu_linear(x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
        gated = silu_and_mul(x) if activation == "silu" else gelu_and_mul(x, activation == "gelu_tanh")
        return product(gated, packed, bias, num_outputs)

    def activation_linear(
        x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int
    ) -> Tensor:
        return product(ACTIVATIONS[activation](x), packed, bias, num_outputs)

    return rms_norm_linear, glu_linear, activation_linear
