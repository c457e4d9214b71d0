"""Experts for devices without a kernel of their own: torch's grouped product over pairs sorted by expert.

A pair is a token and one of its experts. The host waits for nothing, so a step with experts can be captured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from quire.errors import ConfigError
from quire.kernels.allocation import zeros
from quire.kernels.expert_forms import in_floats
from quire.kernels.expert_products import ExpertLoop, pack_each, pack_floats
from quire.kernels.gates import gated
from quire.kernels.interface import (
    Allocate,
    ExpertMatrices,
    ExpertWeight,
    Mxfp4Matrix,
    PackedExperts,
)
from quire.kernels.low_bit import quantize_linear
from quire.kernels.reference import linear, linear_coded, linear_quantized, pack_coded
from quire.quantization import WeightFormat

_ALIGNED_BYTES = 16
"""Bytes. torch's grouped product needs rows that begin at a multiple of this."""


def pack_experts(matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = zeros) -> ExpertWeight:
    """Floats [E, N, K] on the device of the matrices. Few bits become floats: torch multiplies nothing smaller."""
    if not isinstance(stored, str):
        if isinstance(matrices[0][0], Mxfp4Matrix):
            raise ConfigError("quantization: experts in MXFP4 are not quantised again; leave it out, or run on the CPU")
        return pack_each(in_floats(matrices), stored, allocate, pack_linear, quantize_linear, pack_coded)
    return pack_floats(in_floats(matrices), stored, pack_linear, allocate)


def pack_linear(weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
    """Matrices [N_i, K] -> [sum of N_i, K], as the checkpoint has them: torch multiplies no other layout."""
    stored = [weight.to(getattr(torch, dtype)) for weight in weights]
    return stored[0] if len(stored) == 1 else torch.cat(stored)


def experts(x: Tensor, chosen: Tensor, weights: Tensor, experts: PackedExperts, out: Tensor) -> None:
    gate_up, down = experts.gate_up, experts.down
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return _LOOP(x, chosen, weights, experts, out)
    expert_of_pair, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(
        expert_of_pair, torch.arange(experts.num_experts, device=x.device, dtype=chosen.dtype), right=True
    ).int()
    rows = _product(x[order // chosen.shape[1]], gate_up, experts.gate_up_bias, expert_of_pair, ends)
    rows = _product(gated(rows, experts.activation), down, experts.down_bias, expert_of_pair, ends)
    # Back in the order of tokens; a token's sum is in the order of its experts' weights.
    of_tokens = torch.empty_like(rows).index_copy_(0, order, rows).view(*chosen.shape, x.shape[1])
    out += (of_tokens * weights.unsqueeze(-1).to(x.dtype)).sum(1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, expert_of_row: Tensor, ends: Tensor) -> Tensor:
    """x [M, K], sorted by expert; `ends` [E] is the row after each expert's last. -> [M, N]"""
    weight = weight.to(x.dtype)
    if any(width * weight.element_size() % _ALIGNED_BYTES for width in weight.shape[1:]):
        out = torch.einsum("mk,mnk->mn", x, weight[expert_of_row])
    else:
        out = functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return out if bias is None else out + bias[expert_of_row].to(x.dtype)


_LOOP = ExpertLoop(linear, linear_quantized, linear_coded)
