"""The kernels in plain PyTorch for any device: KV is gathered through the block tables for torch's own attention.

They serve devices without kernels of their own (older GPUs, MPS), and tests of device code on a CPU. They are slower
than a paged kernel, since KV is read, copied and read again, but nothing here depends on the device. No operation waits
for the device: every shape is known on the host. `quire.kernels.reference` specifies what each computes.

Activations have any float type and sums are float32. Caches are [num_blocks, num_kv_heads, block_size, head_dim] of any
float type or float8_e4m3fn; values beyond the range of float16 and float8 are clamped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from quire.kernels import reference
from quire.kernels.grouped_experts import experts, pack_experts, pack_linear
from quire.kernels.host_sampling import row_argmax, sample_tokens
from quire.kernels.interface import AttentionParams, AttentionPlan, KVLayer, KVShape
from quire.kernels.lora import LORA_TILE
from quire.kernels.lora import add_lora_in_tiles as add_lora
from quire.kernels.post_norm import layer_after_layer
from quire.kernels.recurrence import causal_conv, gated_delta_rule
from quire.kernels.reference import (
    gather_rows_quantized,
    gelu_and_mul,
    linear_coded,
    linear_quantized,
    pack_blocks,
    pack_coded,
    quantize_linear,
    silu_and_mul,
)
from quire.kernels.unfused import layer_norm, unfused

__all__ = [
    "LORA_TILE",
    "SdpaPlan",
    "SequenceRun",
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
    "quantize_linear",
    "rms_norm",
    "rms_norm_heads_",
    "rms_norm_linear",
    "rotary_",
    "rotary_write_kv",
    "row_argmax",
    "sample_tokens",
    "silu_and_mul",
    "write_kv",
]


@dataclass(frozen=True, slots=True)
class SequenceRun:
    """Sequences that are computed together: n sequences with q new tokens each and at most b blocks."""

    tokens: Tensor
    """[n, q] int64: rows of q and of the output."""
    blocks: Tensor
    """[n, b] int64: their block tables, with a window from the first block on that a new token sees; an entry past a
    sequence's end is any block."""
    distance: Tensor
    """[n, q, b * block_size] int32: position of the key minus position of the query. Above zero the key is hidden."""
    seq_lens: Tensor
    """[n, 1] int64: tokens in these blocks."""


@dataclass(frozen=True, slots=True)
class SdpaPlan(AttentionPlan):
    """An AttentionPlan whose tensors lie on the device, without work items."""

    runs: list[SequenceRun] = field(default_factory=list)


def describe() -> str:
    return "sdpa"


def kv_cache_shapes(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, *, scaled: bool = False
) -> tuple[KVShape, KVShape]:
    assert not scaled, "only the CPU's own kernels store int8"
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return shape, shape


def latent_layer(keys: Tensor, value_dim: int) -> KVLayer:
    return KVLayer(keys, keys[..., keys.shape[3] - value_dim :], is_latent=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm(residual, weight, eps)


def rms_norm_heads_(x: Tensor, weight: Tensor, eps: float) -> None:
    x.copy_(rms_norm(x, weight, eps))


def rotary_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
        x[..., :rotary_dim] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def write_kv(k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
    if not len(slots):
        return
    # A token that is not stored repeats the write of the first one that is; if none is, the slot keeps its value. A
    # mask would be simpler, but the host would have to wait for the number of its ones.
    stored = slots >= 0
    row = torch.where(stored, torch.arange(len(slots), device=slots.device), stored.int().argmax())
    slot = slots[row].long().clamp(min=0)
    block_size = kv.values.shape[2]
    place = (slot // block_size, slice(None), slot % block_size)
    any_stored = stored.any()
    stores = ((k, kv.keys, kv.k_scale), (v, kv.values, kv.v_scale))
    for new, cache, scale in stores[:1] if kv.is_latent else stores:
        values = new.index_select(0, row)
        if scale is not None:
            values = values.float() / scale[:, None]
        values = _narrow(values, cache.dtype)
        raw = _bits(cache)
        raw[place] = torch.where(any_stored, _bits(values), raw[place])


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, kv: KVLayer, slots: Tensor
) -> None:
    rotary_(q, k, positions, cos_sin)
    write_kv(k, v, kv, slots)


def copy_blocks(layers: Sequence[KVLayer], pairs: Tensor) -> None:
    reference.copy_blocks(
        [replace(layer, keys=_bits(layer.keys), values=_bits(layer.values)) for layer in layers], pairs
    )


def gather_rows(packed: Tensor, ids: Tensor, num_inputs: int) -> Tensor:
    return packed.index_select(0, ids)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    return functional.linear(x, packed, None if bias is None else bias.to(x.dtype))


rms_norm_linear, glu_linear, activation_linear = unfused(
    rms_norm, add_rms_norm, silu_and_mul, gelu_and_mul, linear, linear_quantized, linear_coded
)
post_norm_layers_ = layer_after_layer(__name__)


def paged_attention(q: Tensor, kv: KVLayer, plan: AttentionPlan, params: AttentionParams) -> Tensor:
    assert isinstance(plan, SdpaPlan), "made by quire.attention.sdpa"
    out = q.new_zeros(*q.shape[:2], kv.values.shape[3])
    for run in plan.runs:
        keys, values = _gather(kv.keys, run.blocks, q.dtype), _gather(kv.values, run.blocks, q.dtype)
        for x, head_scale in ((keys, kv.k_scale), (values, kv.v_scale)):
            if head_scale is not None:
                x.mul_(head_scale[:, None, None])
        # Slots past a sequence's end may hold anything, and NaN times 0 is NaN.
        unwritten = torch.arange(keys.shape[2], device=q.device) >= run.seq_lens
        keys, values = (x.masked_fill_(unwritten[:, None, :, None], 0) for x in (keys, values))
        queries = q[run.tokens].transpose(1, 2)  # [n, heads, q, D]
        hidden = run.distance > 0
        if params.window > 0:
            hidden |= run.distance <= -params.window
        hidden = hidden.unsqueeze(1)
        if params.softcap > 0 or params.sinks is not None:
            attended = _by_definition(queries, keys, values, hidden, run.distance, params)
        else:
            mask = ~hidden
            if params.alibi_slopes is not None:
                mask = _alibi(params.alibi_slopes, run.distance).masked_fill(hidden, float("-inf")).to(q.dtype)
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=params.scale, enable_gqa=True
            )
        out[run.tokens] = attended.transpose(1, 2)
    return out


def _by_definition(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, distance: Tensor, params: AttentionParams
) -> Tensor:
    """Attention with a soft cap or sinks, which torch's own lacks."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = (queries.float() @ keys.float().transpose(2, 3)) * params.scale
    if params.softcap > 0:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if params.alibi_slopes is not None:
        scores = scores + _alibi(params.alibi_slopes, distance)
    scores = scores.masked_fill(hidden, float("-inf"))
    if params.sinks is not None:
        sinks = params.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values.float()).to(queries.dtype)


def _alibi(slopes: Tensor, distance: Tensor) -> Tensor:
    return slopes.float().view(1, -1, 1, 1) * distance.unsqueeze(1)


def _gather(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """cache [num_blocks, heads, block_size, D], blocks [n, b] -> [n, heads, b * block_size, D], a copy."""
    num_sequences, num_blocks = blocks.shape
    gathered = _bits(cache).index_select(0, blocks.flatten()).view(cache.dtype)
    by_sequence = gathered.view(num_sequences, num_blocks, *cache.shape[1:])
    return by_sequence.transpose(1, 2).flatten(2, 3).to(dtype)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in (torch.float16, torch.float8_e4m3fn):
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _bits(x: Tensor) -> Tensor:
    """8-bit floats as bytes: not every device indexes them."""
    return x if x.dtype.itemsize > 1 else x.view(torch.uint8)
