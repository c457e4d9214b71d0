"""Every kernel in plain PyTorch: the specification the fast ones are tested against.

Works in any float type; with float64 inputs it is the oracle. Written to be read, not to be fast. Shapes: T new
tokens of all sequences, H hidden size, D head_dim; the cache layout is described in `quire.kernels.interface`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quire.kernels import low_bit
from quire.kernels.allocation import zeros
from quire.kernels.block_matrix import BlockWeight
from quire.kernels.block_products import gather_rows_blocks, keep_blocks, linear_blocks
from quire.kernels.coded import CodedMatrix, CodedWeight, join
from quire.kernels.expert_products import ExpertLoop, pack_each
from quire.kernels.interface import (
    KV_SCALE_ROWS,
    Allocate,
    AttentionParams,
    AttentionPlan,
    ExpertMatrices,
    ExpertWeight,
    KVLayer,
    KVShape,
    LowBitWeight,
    StateLayer,
)
from quire.kernels.lora import LORA_TILE as LORA_TILE
from quire.kernels.lora import add_lora as add_lora
from quire.kernels.low_bit import quantize_groups as quantize_groups
from quire.kernels.low_bit import quantize_linear as quantize_linear
from quire.kernels.low_bit import quantize_rows
from quire.kernels.post_norm import layer_after_layer
from quire.kernels.recurrent_plan import RecurrentPlan
from quire.kernels.unfused import layer_norm as layer_norm
from quire.kernels.unfused import unfused
from quire.quantization import WeightFormat


def describe() -> str:
    """Name of the build in use."""
    return "reference"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H], weight [H] -> [T, H]: each row divided by its root mean square, times the weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, residual [T, H], weight [H] -> [T, H]: adds x to the residual in place and returns the sum's norm."""
    residual += x
    return rms_norm(residual, weight, eps)


def rms_norm_heads_(x: Tensor, weight: Tensor, eps: float) -> None:
    """x [T, heads, D], weight [D]: normalises each head in place."""
    x.copy_(rms_norm(x, weight, eps))


def rotary_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """q, k [T, heads, D], positions [T], cos_sin [P, R]: rotates the first R of D dimensions in place.

    Dimension i < R/2 is paired with i + R/2; row p of cos_sin holds the R/2 cosines of position p, then its sines.
    """
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        first, second = x[..., : cos_sin.shape[1]].clone().chunk(2, dim=-1)
        x[..., : cos_sin.shape[1]] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_and_mul(x: Tensor) -> Tensor:
    """x [T, 2 I] -> [T, I]: silu of the first half times the second."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu_and_mul(x: Tensor, tanh: bool) -> Tensor:
    """x [T, 2 I] -> [T, I]: gelu of the first half (exact, or the tanh approximation) times the second."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh" if tanh else "none") * up


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: StateLayer, plan: RecurrentPlan) -> Tensor:
    """x [T, C], weight [C, W], bias [C] -> [T, C]: each channel's own filter over the latest W inputs of its sequence.

    Replaces the latest inputs in `state`, and makes the plan's saves of them.
    """
    out, bounds = torch.empty_like(x), plan.query_start_loc.tolist()
    for sequence, slot in enumerate(plan.slots.tolist()):
        inputs = torch.cat((state.conv[slot].to(x.dtype), x[bounds[sequence] : bounds[sequence + 1]]))
        width = weight.shape[1]
        for index in range(len(inputs) - width + 1):
            row = (inputs[index : index + width] * weight.t()).sum(0)
            out[bounds[sequence] + index] = row if bias is None else row + bias
        for saved, count, target in [*plan.saves.tolist(), [sequence, len(inputs) - width + 1, slot]]:
            if saved == sequence:
                state.conv[target] = inputs[count : count + width - 1]
    return out


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, state: StateLayer, plan: RecurrentPlan
) -> Tensor:
    """q, k [T, G, K], v [T, H, V], log_decay, beta [T, H] -> [T, H, V]. Key head g serves the H / G heads from
    g * H / G on.

    Per head and token: S = exp(log_decay) * S; d = beta * (v - k S); S = S + outer(k, d); the output is q S. Without
    `beta` d is v: plain linear attention, and so the state space model of Mamba-2. Replaces S in `state`,
    and makes the plan's saves of it.
    """
    out, bounds, group = torch.empty_like(v), plan.query_start_loc.tolist(), v.shape[1] // k.shape[1]
    q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
    for sequence, slot in enumerate(plan.slots.tolist()):
        s = state.recurrent[slot].to(v.dtype)
        saves = {count: target for saved, count, target in plan.saves.tolist() if saved == sequence}
        for count, token in enumerate(range(bounds[sequence], bounds[sequence + 1]), start=1):
            s = log_decay[token].exp()[:, None, None] * s
            d = v[token]
            if beta is not None:
                d = beta[token][:, None] * (d - torch.einsum("hk,hkv->hv", k[token], s))
            s = s + k[token][:, :, None] * d[:, None, :]
            out[token] = torch.einsum("hk,hkv->hv", q[token], s)
            if count in saves:
                state.recurrent[saves[count]] = s
        state.recurrent[slot] = s
    return out


def kv_cache_shapes(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, *, scaled: bool = False
) -> tuple[KVShape, KVShape]:
    """Shapes of one layer's keys and values; `scaled` for int8."""
    key_rows = head_dim + (KV_SCALE_ROWS if scaled else 0)
    return (num_blocks, num_kv_heads, key_rows, block_size), (num_blocks, num_kv_heads, block_size, head_dim)


def latent_layer(keys: Tensor, value_dim: int) -> KVLayer:
    """The layer of these keys whose values are the last `value_dim` elements of each key, and are not stored."""
    end = keys.shape[2] - (KV_SCALE_ROWS if keys.dtype == torch.int8 else 0)
    return KVLayer(keys, keys[:, :, end - value_dim : end].transpose(2, 3), is_latent=True)


def write_kv(k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
    """k, v [T, num_kv_heads, D], slots [T]: stores each token's keys and values at its slot; -1 stores nothing.

    A latent layer stores the keys alone.

    They are divided by the scales of their heads, then rounded to the cache's type. Values beyond the range of float16
    or float8 become its largest number: one infinite key or value would turn all later tokens of its sequence into NaN.
    For int8, each key and each value is a row of `quantize_rows`.
    """
    keys, values, block_size = kv.keys, kv.values, kv.values.shape[2]
    written = slots >= 0
    block, offset = slots[written].long() // block_size, slots[written].long() % block_size
    k, v = (
        x[written] if scale is None else x[written] / scale.to(x.dtype)[:, None]
        for x, scale in ((k, kv.k_scale), (v, kv.v_scale))
    )
    if values.dtype == torch.int8:
        _write_quantized(k, v, kv, block, offset)
        return
    if values.dtype in (torch.float16, torch.float8_e4m3fn):
        limit = torch.finfo(values.dtype).max
        k, v = k.clamp(-limit, limit), v.clamp(-limit, limit)
    keys[block, :, :, offset] = k.to(keys.dtype)
    if not kv.is_latent:
        values[block, :, offset] = v.to(values.dtype)


def _write_quantized(k: Tensor, v: Tensor, kv: KVLayer, block: Tensor, offset: Tensor) -> None:
    """Write the integers to their slots and the scales to the last rows of the keys."""
    head_dim, block_size = k.shape[2], kv.values.shape[2]
    key_bytes = kv.keys.view(*kv.keys.shape[:2], -1)
    for index, x in enumerate((k, k if kv.is_latent else v)):
        numbers, scales = quantize_rows(x.flatten(0, 1))
        if index == 0:
            kv.keys[block, :, :head_dim, offset] = numbers.view(x.shape)
        elif not kv.is_latent:
            kv.values[block, :, offset] = numbers.view(x.shape)
        place = head_dim * block_size + 4 * (index * block_size + offset)
        for byte in range(4):
            key_bytes[block, :, place + byte] = scales.float().view(torch.int8).view(*x.shape[:2], 4)[:, :, byte]


def stored_kv(kv: KVLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as the numbers they stand for: converted to `dtype`, then multiplied by their scales."""
    if kv.values.dtype == torch.int8:
        scales = kv.keys[:, :, -KV_SCALE_ROWS:].flatten(2).contiguous().view(torch.float32).to(dtype)
        key_scales, value_scales = scales.unflatten(2, (2, -1)).unbind(2)
        return kv.keys[:, :, :-KV_SCALE_ROWS] * key_scales.unsqueeze(2), kv.values * value_scales.unsqueeze(3)
    keys, values = (
        x.to(dtype) if scale is None else x.to(dtype) * scale.to(dtype)[:, None, None]
        for x, scale in ((kv.keys, kv.k_scale), (kv.values, kv.v_scale))
    )
    return keys, values


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, kv: KVLayer, slots: Tensor
) -> None:
    """`rotary_`, then `write_kv`; in one pass where a device can. The content of k afterwards is undefined."""
    rotary_(q, k, positions, cos_sin)
    write_kv(k, v, kv, slots)


def copy_blocks(layers: Sequence[KVLayer], pairs: Tensor) -> None:
    """pairs [N, 2]: copies block pairs[i, 0] to pairs[i, 1] in every layer.

    No destination is also a source.
    """
    source, destination = pairs.long().unbind(1)
    for layer in layers:
        layer.keys[destination] = layer.keys[source]
        if not layer.is_latent:
            layer.values[destination] = layer.values[source]


def pack_linear(weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
    """weights [N_i, K] -> one weight of sum(N_i) outputs, stored as `dtype` in a layout of the kernels' own."""
    return torch.cat([weight.to(getattr(torch, dtype)) for weight in weights])


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """x [M, K], a packed weight of N outputs, bias [N] -> x weight^T + bias [M, N]."""
    return torch.nn.functional.linear(x, packed.to(x.dtype), bias)


def pack_coded(matrices: Sequence[CodedMatrix], allocate: Allocate = zeros) -> CodedWeight:
    """matrices [N_i, K] that `can_join` -> one weight of sum(N_i) outputs that keeps their bits."""
    whole = join(matrices)
    order = None if whole.order is None else whole.order.int()
    zero_points = whole.zeros is not None
    return CodedWeight(whole.codes, whole.scales, whole.offsets, zero_points, whole.group_size, whole.levels, order)


def linear_coded(x: Tensor, weight: CodedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    """x [M, K], a weight of N outputs, bias [N] -> x weight^T + bias [M, N]. Activations are floats: the weight is
    multiplied as the numbers that its codes stand for."""
    zeros, shifts = (weight.offsets, None) if weight.zero_points else (None, weight.offsets)
    matrix = CodedMatrix(weight.codes, weight.scales, weight.group_size, weight.levels, zeros, shifts, weight.order)
    return torch.nn.functional.linear(x, matrix.dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_quantized(x: Tensor, weight: LowBitWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    """x [M, K], a weight of few bits of N outputs, bias [N] -> x weight^T + bias [M, N], with the rows of x in few bits
    too. `low_bit.linear_quantized` and `linear_blocks` say what each format computes."""
    if isinstance(weight, BlockWeight):
        return linear_blocks(x, weight, bias)
    return low_bit.linear_quantized(x, weight, bias, num_outputs)


pack_blocks = keep_blocks


def pack_experts(matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = zeros) -> ExpertWeight:
    """See `pack_each`."""
    return pack_each(matrices, stored, allocate, pack_linear, quantize_linear, pack_coded)


experts = ExpertLoop(linear, linear_quantized, linear_coded)
rms_norm_linear, glu_linear, activation_linear = unfused(
    rms_norm, add_rms_norm, silu_and_mul, gelu_and_mul, linear, linear_quantized, linear_coded
)
post_norm_layers_ = layer_after_layer(__name__)


def gather_rows(packed: Tensor, ids: Tensor, num_inputs: int) -> Tensor:
    """A packed weight [N, num_inputs], ids [T] of its outputs -> their rows [T, num_inputs], in float32."""
    return packed[ids].float()


def gather_rows_quantized(weight: LowBitWeight, ids: Tensor, num_inputs: int) -> Tensor:
    """A weight of `num_inputs` inputs, ids [T] of its outputs -> their rows [T, num_inputs] in float32."""
    if isinstance(weight, BlockWeight):
        return gather_rows_blocks(weight, ids)
    return low_bit.gather_rows_quantized(weight, ids, num_inputs)


def paged_attention(q: Tensor, kv: KVLayer, plan: AttentionPlan, params: AttentionParams) -> Tensor:
    """q [T, num_heads, D] -> [T, num_heads, value_dim]: causal attention of new tokens over their sequences' blocks.

    The i-th of a sequence's n new tokens is at position seq_lens - n + i and sees the keys up to that position;
    with window > 0 only the last `window` of them. Query head h reads KV head h // (num_heads / num_kv_heads). The soft
    cap applies before the slopes are added. A sink is a score like the others, of a key that has no value.
    """
    num_heads, group = q.shape[1], q.shape[1] // kv.values.shape[1]
    out = q.new_zeros(*q.shape[:2], kv.values.shape[3])
    start = plan.query_start_loc.tolist()
    for s, seq_len in enumerate(plan.seq_lens.tolist()):
        query = q[start[s] : start[s + 1]]
        num_blocks = -(-seq_len // kv.values.shape[2])
        table = plan.block_tables[s, :num_blocks].long()
        keys, values = stored_kv(replace(kv, keys=kv.keys[table], values=kv.values[table]), q.dtype)
        # [blocks, kv heads, D, block] and [blocks, kv heads, block, D] -> [heads, keys, D]
        key = keys.permute(1, 0, 3, 2).flatten(1, 2)[:, :seq_len].repeat_interleave(group, 0)
        value = values.permute(1, 0, 2, 3).flatten(1, 2)[:, :seq_len].repeat_interleave(group, 0)

        scores = torch.einsum("qhd,hkd->hqk", query, key) * params.scale
        if params.softcap > 0:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        key_position = torch.arange(seq_len)
        query_position = torch.arange(seq_len - len(query), seq_len)
        distance = key_position[None, :] - query_position[:, None]
        if params.alibi_slopes is not None:
            scores = scores + params.alibi_slopes.to(q.dtype).view(num_heads, 1, 1) * distance
        hidden = distance > 0
        if params.window > 0:
            hidden |= distance <= -params.window
        scores = scores.masked_fill(hidden, float("-inf"))
        if params.sinks is not None:
            sinks = params.sinks.to(q.dtype).view(num_heads, 1, 1).expand(-1, len(query), 1)
            scores = torch.cat((scores, sinks), dim=-1)
        probabilities = scores.softmax(-1)[..., :seq_len]
        out[start[s] : start[s + 1]] = torch.einsum("hqk,hkd->qhd", probabilities, value)
    return out


def row_argmax(x: Tensor, peaks: Tensor, ids: Tensor) -> None:
    """x [M, N], N > 0: writes the highest number of each row to `peaks` [M] float32 and its first index to `ids` [M]
    int32. NaN is higher than all."""
    peaks.copy_(x.amax(dim=1))
    is_peak = torch.where(peaks.isnan()[:, None], x.isnan(), x == peaks[:, None])
    ids.copy_(is_peak.int().cummax(dim=1).values.eq(0).sum(dim=1))


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
    """x [M, N] logits, N > 0; all others [M]: samples a token of each row by its probability at the row's temperature.

    Three filters apply in turn. `min_p` removes tokens less than `min_p` times as likely as the likeliest. `top_k`
    keeps the `top_k` likeliest (0: all). `top_p` keeps the fewest likeliest that hold `top_p` of the rest. Among equals
    the lowest ids stay. `uniforms`, in [0, 1), select by the inverse of the cumulative distribution: over tokens
    ordered by likelihood if top_k or top_p filters, else by id. Temperatures and min_p are float32, top_k int32, top_p
    and uniforms float64. Writes the highest logits to `peaks` and the tokens to `ids`; where a peak is not finite, the
    token means nothing.
    """
    row_argmax(x, peaks, ids)
    for row in peaks.isfinite().nonzero().flatten().tolist():
        scores = (x[row].double() - peaks[row].double()) / temperatures[row].double()
        weights = scores.exp()
        weights[weights < min_p[row].double()] = 0
        order = torch.arange(len(scores))
        if top_k[row] or top_p[row] < 1:
            order = scores.sort(descending=True, stable=True).indices
            if top_k[row]:
                order = order[: int(top_k[row])]
            cumulative = weights[order].cumsum(0)
            order = order[: 1 + int((cumulative < top_p[row] * cumulative[-1]).sum())]
        cumulative = weights[order].cumsum(0)
        place = int((cumulative <= uniforms[row] * cumulative[-1]).sum())
        ids[row] = order[min(place, int(weights[order].nonzero().max()))]
