"""The kernels for CPU tensors, in C++ (`csrc/`). What each computes is written in `quire.kernels.reference`.

Activations are float32, caches float32, float16, bfloat16 or int8, indices int32. The first dimension of q, k, v and x
may have any stride, so views of one fused projection need no copy; all else is contiguous. The C++ code checks every
argument and raises ValueError with what it expected and what it found.

On import, the best build for this CPU that passes its self-test is chosen. QUIRE_CPU_ISA forces one of
`supported_isas()`, which must pass the test too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quire.kernels import _cpu
from quire.kernels.allocation import ignore, row_pieces, zeros
from quire.kernels.block_matrix import INTERLEAVED_ROWS, BlockMatrix, BlockWeight
from quire.kernels.block_products import keep_blocks
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.coded_panels import pack_panels
from quire.kernels.cpu_arguments import blocks_of, codes_of, form_of, parts_of, refuse_scales, stored_values
from quire.kernels.cpu_isa import describe, isa, supported_isas, use_best_isa, use_isa
from quire.kernels.cpu_post_norm import post_norm_layers_
from quire.kernels.expert_products import pack_each
from quire.kernels.gates import SWIGLU_ALPHA, SWIGLU_LIMIT
from quire.kernels.interface import (
    Allocate,
    AttentionParams,
    AttentionPlan,
    CpuAttentionPlan,
    ExpertMatrices,
    ExpertWeight,
    KVLayer,
    LowBitWeight,
    PackedExperts,
    PackedWeight,
    QuantizedWeight,
)
from quire.kernels.lora import LoraRows, LoraWeights
from quire.kernels.recurrence import causal_conv, gated_delta_rule
from quire.kernels.reference import kv_cache_shapes, latent_layer
from quire.quantization import WeightFormat

__all__ = [
    "LORA_TILE",
    "activation_linear",
    "add_lora",
    "add_rms_norm",
    "causal_conv",
    "copy_blocks",
    "describe",
    "experts",
    "gated_delta_rule",
    "gather_rows",
    "gather_rows_quantized",
    "gelu_and_mul",
    "glu_linear",
    "interleave_blocks",
    "isa",
    "kv_cache_shapes",
    "latent_layer",
    "layer_norm",
    "linear",
    "linear_coded",
    "linear_quantized",
    "pack_blocks",
    "pack_coded",
    "pack_experts",
    "pack_linear",
    "paged_attention",
    "post_norm_layers_",
    "quantize_groups",
    "quantize_linear",
    "rms_norm",
    "rms_norm_heads_",
    "rms_norm_linear",
    "rotary_",
    "rotary_write_kv",
    "row_argmax",
    "sample_tokens",
    "silu_and_mul",
    "supported_isas",
    "use_best_isa",
    "use_isa",
    "write_kv",
]

PACKING = 4
"""Version of the packed layout. Raise it with every change of a packed weight's bytes: it is part of cache keys."""
PIECE_BYTES = 8 << 20
"""Bytes of a weight that are packed at a time."""
LORA_TILE: int = _cpu.lora_tile


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _cpu.rms_norm(x, None, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _cpu.rms_norm(x, residual, weight, eps, out)
    return out


def layer_norm(residual: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if residual.dim() > 2:
        flat = None if update is None else update.flatten(0, -2)
        return layer_norm(residual.flatten(0, -2), flat, weight, bias, eps).view(residual.shape)
    out = torch.empty(residual.shape)
    x, total = (residual, None) if update is None else (update, residual)
    _cpu.layer_norm(x, total, weight, bias, eps, out)
    return out


def rms_norm_heads_(x: Tensor, weight: Tensor, eps: float) -> None:
    _cpu.rms_norm_heads(x, weight, eps)


def rotary_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    _cpu.rotary(q, k, positions, cos_sin)


def silu_and_mul(x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1] // 2)
    _cpu.silu_and_mul(x, out)
    return out


def gelu_and_mul(x: Tensor, tanh: bool) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1] // 2)
    (_cpu.gelu_tanh_and_mul if tanh else _cpu.gelu_and_mul)(x, out)
    return out


def write_kv(k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
    refuse_scales(kv)
    _cpu.write_kv(k, v, kv.keys, stored_values(kv), slots)


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, kv: KVLayer, slots: Tensor
) -> None:
    rotary_(q, k, positions, cos_sin)
    write_kv(k, v, kv, slots)


def copy_blocks(layers: Sequence[KVLayer], pairs: Tensor) -> None:
    _cpu.copy_blocks([layer.keys for layer in layers], list(map(stored_values, layers)), pairs)


def pack_linear(
    weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros, done: Callable[[Tensor], None] = ignore
) -> Tensor:
    """`done` gets the rows that were packed, piece by piece."""
    num_rows, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    # The last panel may have lanes without an output, and the last bfloat16 pair an element without an input: both 0.
    depth = k + k % 2 if dtype == "bfloat16" else k
    packed = allocate((-(-num_rows // _cpu.panel), depth, _cpu.panel), dtype=getattr(torch, dtype))
    # A pair of bfloat16 is placed as a float32 is, and one copy of 32 bits is faster than two conversions.
    in_pairs = dtype == "bfloat16" and depth == k and all(weight.dtype == torch.bfloat16 for weight in weights)
    target = packed.view(*packed.shape[:1], -1).view(torch.float32).view(-1, k // 2, _cpu.panel) if in_pairs else packed
    first_row = 0
    for rows in row_pieces(weights, _cpu.panel, PIECE_BYTES):
        source = rows.contiguous()
        _cpu.pack_linear(source.view(torch.float32) if in_pairs else source, target, first_row)
        first_row += rows.shape[0]
        done(rows)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    return _linear(x, "none", None, None, 0.0, packed, bias, num_outputs)


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
        return _linear(residual, "rms_norm", None, norm_weight, eps, packed, bias, num_outputs)
    return _linear(update, "rms_norm", residual, norm_weight, eps, packed, bias, num_outputs)


def glu_linear(x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    return _linear(x, activation, None, None, 0.0, packed, bias, num_outputs)


def activation_linear(
    x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int
) -> Tensor:
    return _linear(x, f"plain_{activation}", None, None, 0.0, packed, bias, num_outputs)


def _linear(
    x: Tensor,
    op: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    packed: PackedWeight,
    bias: Tensor | None,
    num_outputs: int,
) -> Tensor:
    """Dense layer of op(x). An `op` is "none", "rms_norm", an activation that gates the second half of x,
    or "plain_" and an activation."""
    out = torch.empty(x.shape[0], num_outputs)
    if isinstance(packed, CodedWeight):
        _cpu.linear_coded(x, op, residual, norm_weight, eps, codes_of(packed), bias, out)
    elif isinstance(packed, BlockWeight):
        _cpu.linear_blocks(x, op, residual, norm_weight, eps, *blocks_of(packed), bias, out)
    elif isinstance(packed, QuantizedWeight):
        form = (packed.values, packed.scales, *form_of(packed.stored))
        _cpu.linear_quantized(x, op, residual, norm_weight, eps, *form, bias, out)
    else:
        _cpu.linear(x, op, residual, norm_weight, eps, packed, bias, out)
    return out


def quantize_groups(x: Tensor, group_size: int, rotates: bool = False) -> tuple[Tensor, Tensor]:
    num_rows, k = x.shape
    padded = torch.empty(num_rows, -(-k // _cpu.pair_of_steps) * _cpu.pair_of_steps, dtype=torch.int8)
    scales = torch.empty(num_rows, -(-k // group_size))
    _cpu.quantize_groups(x, group_size, rotates, padded, scales)
    return padded[:, :k], scales


def quantize_linear(
    weights: Sequence[Tensor],
    stored: WeightFormat,
    allocate: Allocate = zeros,
    done: Callable[[Tensor], None] = ignore,
) -> QuantizedWeight:
    """`done` gets the rows that were packed, piece by piece."""
    num_rows, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    num_panels, num_pairs = -(-num_rows // _cpu.panel), -(-k // _cpu.pair_of_steps)
    num_groups = -(-k // stored.group_size)
    # The last panel may have lanes without an output: 0.
    packed = allocate((num_panels, num_pairs, stored.bits // 4, _cpu.panel, 4), dtype=torch.uint8)
    if stored.bits == 8:
        scales = allocate((num_panels, num_groups, _cpu.panel), dtype=torch.bfloat16)
    else:  # an offset and a scale; before them the units, which take the bytes of two groups
        scales = allocate((num_panels, num_groups + 2, _cpu.panel, 2), dtype=torch.uint8)
    first_row = 0
    for rows in row_pieces(weights, _cpu.panel, PIECE_BYTES):
        _cpu.quantize_linear(rows.contiguous(), packed, scales, *form_of(stored), first_row)
        first_row += rows.shape[0]
        done(rows)
    return QuantizedWeight(packed, scales, stored)


pack_blocks = keep_blocks


def interleave_blocks(
    weight: BlockWeight, allocate: Allocate = zeros, done: Callable[[Tensor], None] = ignore
) -> BlockWeight:
    """A copy that few rows are multiplied with faster, or the weight itself if it cannot be interleaved. `done` gets
    the rows that were copied, piece by piece."""
    if weight.interleaved or any(part.rows.shape[-2] % INTERLEAVED_ROWS for part in weight.parts):
        return weight
    parts = []
    for part in weight.parts:
        copy = allocate(part.rows.shape, dtype=torch.uint8)
        first, target = 0, copy.view(-1, copy.shape[-1])
        for rows in row_pieces([part.rows.reshape(target.shape)], INTERLEAVED_ROWS, PIECE_BYTES):
            _cpu.interleave_blocks(rows.contiguous(), part.type_name, target[first : first + len(rows)])
            first += len(rows)
            done(rows)
        parts.append(BlockMatrix(copy, part.type_name))
    return replace(weight, parts=tuple(parts), interleaved=True)


def linear_quantized(x: Tensor, weight: LowBitWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    return _linear(x, "none", None, None, 0.0, weight, bias, num_outputs)


def pack_coded(matrices: Sequence[CodedMatrix], allocate: Allocate = zeros) -> CodedWeight:
    return pack_panels(matrices, _cpu.panel, allocate)


def linear_coded(x: Tensor, weight: CodedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    return _linear(x, "none", None, None, 0.0, weight, bias, num_outputs)


def pack_experts(
    matrices: ExpertMatrices,
    stored: str | WeightFormat,
    allocate: Allocate = zeros,
    done: Callable[[Tensor], None] = ignore,
) -> ExpertWeight:
    """`done` gets the rows that were packed, piece by piece, where they were floats."""
    pack, quantize = partial(pack_linear, done=done), partial(quantize_linear, done=done)
    return pack_each(matrices, stored, allocate, pack, quantize, pack_coded)


def experts(x: Tensor, chosen: Tensor, weights: Tensor, experts: PackedExperts, out: Tensor) -> None:
    tokens = (x, chosen, weights, experts.activation, SWIGLU_ALPHA, SWIGLU_LIMIT, experts.num_inner)
    gate_up, down, biases = experts.gate_up, experts.down, (experts.gate_up_bias, experts.down_bias)
    if isinstance(gate_up, BlockWeight) and isinstance(down, BlockWeight):
        _cpu.experts_blocks(tokens, blocks_of(gate_up), biases[0], blocks_of(down), biases[1], out)
    elif isinstance(gate_up, CodedWeight) and isinstance(down, CodedWeight):
        _cpu.experts_coded(tokens, codes_of(gate_up), biases[0], codes_of(down), biases[1], out)
    else:
        form, rotates, *_ = parts_of(gate_up)
        _cpu.experts(tokens, form, rotates, *parts_of(gate_up)[2:], biases[0], *parts_of(down)[2:], biases[1], out)


def add_lora(out: Tensor, x: Tensor, rows: LoraRows, weights: LoraWeights) -> None:
    _cpu.add_lora(x, weights.a, weights.b, weights.ranks, weights.part_ends, rows.rows, rows.tiles, out)


def gather_rows(packed: Tensor, ids: Tensor, num_inputs: int) -> Tensor:
    out = torch.empty(ids.shape[0], num_inputs)
    _cpu.gather_rows(packed, ids, out)
    return out


def gather_rows_quantized(weight: LowBitWeight, ids: Tensor, num_inputs: int) -> Tensor:
    out = torch.empty(ids.shape[0], num_inputs)
    if isinstance(weight, BlockWeight):
        (part,) = weight.parts
        _cpu.gather_rows_blocks(part.rows, part.type_name, weight.interleaved, ids, out)
        return out
    _cpu.gather_rows_quantized(weight.values, weight.scales, *form_of(weight.stored), ids, out)
    return out


def paged_attention(q: Tensor, kv: KVLayer, plan: AttentionPlan, params: AttentionParams) -> Tensor:
    assert isinstance(plan, CpuAttentionPlan)
    refuse_scales(kv)
    if plan.window and not 0 < params.window <= plan.window:
        raise ValueError(f"window: expected 1 to {plan.window}, what the plan was made for, found {params.window}")
    out = torch.empty(*q.shape[:2], kv.values.shape[3])
    _cpu.paged_attention(
        q,
        kv.keys,
        stored_values(kv),
        plan.query_start_loc,
        plan.seq_lens,
        plan.block_tables,
        plan.work,
        plan.shared,
        plan.merges,
        plan.partials,
        params.scale,
        params.window,
        params.softcap,
        params.alibi_slopes,
        params.sinks,
        plan.num_threads,
        out,
    )
    return out


def row_argmax(x: Tensor, peaks: Tensor, ids: Tensor) -> None:
    _cpu.row_peaks(x, peaks, ids)


def sample_tokens(
    x: Tensor,
    temperatures: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    uniforms: Tensor,
    peaks: Tensor,
    ids: Tensor,
) -> None:
    _cpu.draw_tokens(x, temperatures, min_p, top_k, top_p, uniforms, peaks, ids)
