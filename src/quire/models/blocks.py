"""The two halves of a decoder layer that most families share: attention and a dense MLP.

A block takes its input as a tensor, or as a `Normed` whose norm the block's first layer may fuse. T new tokens of all
sequences, R output tokens, H hidden size, D head_dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.layers.attention import Attention
from quire.layers.linear import Linear, LinearWeight
from quire.layers.norm import HeadNorm, JointHeadNorm, Norm, Normed, RMSHeadNorm
from quire.layers.rotary import half_layout, query_scales
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig, RopeConfig
from quire.models.builder import Builder
from quire.models.kv_scales import KVScales, largest_projected, largest_rotated, scales_of, take_kv_scales
from quire.models.shards import Division, Part

HeadNorms = tuple[HeadNorm, HeadNorm]
"""The norms of queries and of keys."""


class SelfAttention:
    """Causal self-attention with grouped KV heads."""

    def __init__(
        self,
        config: ModelConfig,
        qkv: Linear,
        attend: Attention,
        o: Linear,
        *,
        head_norms: HeadNorms | None = None,
        stored_kv_scales: KVScales | None = None,
        cos_sin: Tensor | None = None,
    ) -> None:
        """`stored_kv_scales`: the checkpoint's own, if any. `cos_sin`: the table by which queries and keys turn before
        their norms; else `attend` rotates them."""
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        """Heads of queries, of keys and of values; those of gates follow them."""
        self.num_gates = config.num_heads if config.attention_gate else 0
        self.head_dim = config.head_dim
        self.clip_qkv = config.clip_qkv
        self.qkv = qkv
        self.head_norms = head_norms
        self.attend = attend
        self.o = o
        self.stored_kv_scales = stored_kv_scales
        self.cos_sin = cos_sin

    def __call__(self, x: Tensor | Normed, context: StepContext) -> Tensor:
        """x [T, H] -> [T, H], or [R, H] of the output tokens."""
        projected = self.qkv(x)
        if self.clip_qkv > 0:
            projected.clamp_(-self.clip_qkv, self.clip_qkv)
        # Views of one [T, heads, D] tensor; what follows works on them in place.
        heads = projected.view(projected.shape[0], -1, self.head_dim)
        q, k, v, gates = heads.split_with_sizes((*self.heads, self.num_gates), dim=1)
        if self.cos_sin is not None:
            self.attend.kernels.rotary_(q, k, context.positions, self.cos_sin)
        if self.head_norms is not None:
            norm_queries, norm_keys = self.head_norms
            norm_queries(q)
            norm_keys(k)
        out = self.attend(q, k, v, context)
        if self.num_gates:
            out *= context.select_output(gates).sigmoid()
        return self.o(out.flatten(1))

    def scale_kv(self, norm: Norm) -> None:
        """Scale keys and values for a cache of float8 from now on, by the checkpoint's own scales or else by the least
        with which no key or value overflows. `norm` is that of the block's input."""
        scales = self.stored_kv_scales
        if scales is None:
            if norm.weight is None:
                raise ConfigError(
                    "kv_cache_dtype fp8 needs scales: this model's layers read a residual stream that no norm bounds, "
                    "and its checkpoint has no k_scale and v_scale; use another kv_cache_dtype"
                )
            bounds = largest_projected(self.qkv, norm.weight, norm.bias).view(-1, self.head_dim)
            if self.clip_qkv > 0:
                bounds = bounds.clamp(max=self.clip_qkv)
            _, keys, values, _ = bounds.split_with_sizes((*self.heads, self.num_gates))
            if self.head_norms is not None:
                keys = self.head_norms[1].bound.expand_as(keys)
            scales = KVScales(scales_of(largest_rotated(keys, self.attend.cos_sin)), scales_of(values))
        self.attend.k_scale, self.attend.v_scale = scales


def rotary_attention(
    build: Builder,
    layer: int,
    cos_sin: Tensor | None,
    *,
    names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    head_norms: HeadNorms | None = None,
    rotates_first: bool = False,
) -> SelfAttention:
    """The attention of a layer whose queries, keys and values are stored apart, and rotated by position if there is a
    table. `rotates_first`: before the norms, not after them."""
    config = build.config
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {names[0]: 2 * q_rows if config.attention_gate else q_rows, names[1]: kv_rows, names[2]: kv_rows}
    divisions: tuple[Division, ...] = ("outputs", "kv", "kv")
    q, k, v = (
        build.weights.take_linear(name, (rows, config.hidden_size), bias=config.qkv_bias, split=division)
        for (name, rows), division in zip(sizes.items(), divisions, strict=True)
    )
    gates: tuple[LinearWeight, ...] = ()
    if config.attention_gate:
        # Each head's query is followed by its gate.
        rows = torch.arange(2 * q_rows, device=q.weight.device).view(-1, 2, config.head_dim)
        gates = (q.select_rows(rows[:, 1].flatten()),)
        q = q.select_rows(rows[:, 0].flatten())
    if _is_interleaved(config):
        order = _head_order(config, q.weight.device)
        q, k = (part.select_rows(rows_of_heads(order, len(part.weight))) for part in (q, k))
    return SelfAttention(
        config,
        build.pack(q, k, v, *gates),
        _attend(build, layer, None if rotates_first else cos_sin, q.weight.device),
        build.linear({names[3]: config.hidden_size}, q_rows, bias=config.o_bias, split="inputs"),
        head_norms=head_norms,
        stored_kv_scales=take_kv_scales(build.weights, config.num_kv_heads),
        cos_sin=cos_sin if rotates_first else None,
    )


def fused_attention(
    build: Builder,
    layer: int,
    *,
    names: Sequence[str] = ("query_key_value", "dense"),
    cos_sin: Tensor | None = None,
    by_kv_head: bool = False,
    transposed: bool = False,
) -> SelfAttention:
    """The attention of a layer whose queries, keys and values are stored as one matrix: all queries, then all keys,
    then all values. `by_kv_head`: the queries, the key and the value of each KV head in turn. `transposed`: stored as
    [inputs, outputs]."""
    config, (fused, output) = build.config, names
    q_rows, num_rows = config.num_heads * config.head_dim, config.num_qkv_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    parts: tuple[Part, ...] = (("outputs", q_rows), ("kv", kv_rows), ("kv", kv_rows))
    shards = build.weights.shards
    # Groups of KV heads are divided whole; a single KV head is every rank's.
    grouped = by_kv_head and shards is not None and shards.divides_kv
    qkv = build.weights.take_linear(
        fused,
        (num_rows, config.hidden_size),
        bias=config.qkv_bias,
        transposed=transposed,
        split="outputs" if grouped else parts,
    )
    rows = _order_of_fused_rows(config, by_kv_head, qkv.weight.device)
    return SelfAttention(
        config,
        build.pack(qkv if rows is None else qkv.select_rows(rows)),
        _attend(build, layer, cos_sin, qkv.weight.device),
        build.linear({output: config.hidden_size}, q_rows, bias=config.o_bias, transposed=transposed, split="inputs"),
        stored_kv_scales=take_kv_scales(build.weights, config.num_kv_heads),
    )


def _attend(build: Builder, layer: int, cos_sin: Tensor | None, device: torch.device) -> Attention:
    config = build.config
    slopes = config.alibi_slopes
    return Attention(
        build.kernels,
        config.kv_layer(layer),
        scale=config.attention_scale,
        cos_sin=cos_sin,
        window=config.layer_windows[layer] if config.layer_windows else 0,
        softcap=config.attention_softcap,
        alibi_slopes=torch.tensor(slopes, dtype=torch.float32, device=device) if slopes else None,
        sinks=_sinks(build) if config.attention_sinks else None,
        query_scales=None if cos_sin is None else query_scales(config.rope_of(layer), len(cos_sin), cos_sin.device),
    )


def _sinks(build: Builder) -> Tensor:
    """The sinks of this rank's heads [num_heads]."""
    shards, num_heads = build.weights.shards, build.config.num_heads
    if shards is None:
        return build.weights.take("sinks", (num_heads,)).float()
    return shards.heads(build.weights.take("sinks", (num_heads * shards.ranks.size,)).float(), num_heads)


def rows_of_groups(config: ModelConfig) -> Tensor:
    """The order of the rows of `fused_attention` where every KV head's group is stored together: the heads of its
    queries, then its key, then its value."""
    group = config.num_heads // config.num_kv_heads
    rows = torch.arange(config.num_qkv_heads * config.head_dim)
    parts = rows.view(config.num_kv_heads, group + 2, config.head_dim).split_with_sizes((group, 1, 1), dim=1)
    return torch.cat([part.flatten() for part in parts])


def _order_of_fused_rows(config: ModelConfig, by_kv_head: bool, device: torch.device) -> Tensor | None:
    """The stored rows in the order queries, keys, values, pairs of a rotation in halves; None: as they are stored."""
    if not (by_kv_head and config.num_kv_heads > 1) and not _is_interleaved(config):
        return None
    rows = rows_of_groups(config) if by_kv_head else torch.arange(config.num_qkv_heads * config.head_dim)
    rows = rows.to(device).view(-1, config.head_dim)
    if _is_interleaved(config):
        rotated = config.num_heads + config.num_kv_heads
        rows[:rotated] = rows[:rotated, _head_order(config, device)]
    return rows.flatten()


def rms_head_norms(build: Builder, *, names: tuple[str, str] = ("q_norm", "k_norm")) -> HeadNorms | None:
    """RMSNorm of queries and keys, where the config has them: of each head, with one weight for all heads, or of all
    heads together."""
    config = build.config
    if not config.qk_norm:
        return None

    def norm(name: str, num_heads: int) -> HeadNorm:
        if config.qk_norm_joint:
            weight = build.weights.take(f"{name}.weight", (num_heads * config.head_dim,)).float()
            return JointHeadNorm(build.kernels, weight, config.norm_eps, config.head_dim)
        weight = build.weights.take(f"{name}.weight", (config.head_dim,)).float()
        if config.norm_unit_offset:
            weight = weight + 1
        weight = in_head_order(config, weight)
        return RMSHeadNorm(build.kernels, weight, config.norm_eps)

    return norm(names[0], config.num_heads), norm(names[1], config.num_kv_heads)


def in_head_order(config: ModelConfig, x: Tensor) -> Tensor:
    """x [..., D], the elements of heads as they are stored -> as queries and keys are computed."""
    return x[..., _head_order(config, x.device)] if _is_interleaved(config) else x


def _is_interleaved(config: ModelConfig) -> bool:
    return config.rope is not None and config.rope.layout == "interleaved"


def _head_order(config: ModelConfig, device: torch.device) -> Tensor:
    rope = config.rope or RopeConfig()
    return half_layout(config.head_dim, rope.rotary_dim(config.head_dim), device)


def rows_of_heads(order: Tensor, num_rows: int) -> Tensor:
    """An order of a head's elements -> the same order of the rows of all heads."""
    first = torch.arange(0, num_rows, len(order), device=order.device)
    return (first[:, None] + order).flatten()


class GatedMLP:
    """down(activation(gate(x)) * up(x)); gate and up are one layer."""

    __slots__ = ("activation", "down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear, activation: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """x [T, H] -> [T, H]."""
        return self.down.after_gate(self.gate_up(x), self.activation)


def gated_mlp(build: Builder, inner: int, *, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> GatedMLP:
    """An MLP of `inner` width whose gate, up and down are stored apart."""
    config, (gate, up, down) = build.config, names
    hidden = config.hidden_size
    return GatedMLP(
        build.linear({gate: inner, up: inner}, hidden, bias=config.mlp_bias, split="outputs"),
        build.linear({down: hidden}, inner, bias=config.mlp_bias, split="inputs"),
        config.activation,
    )


def fused_gated_mlp(build: Builder, inner: int, *, names: Sequence[str] = ("gate_up_proj", "down_proj")) -> GatedMLP:
    """An MLP of `inner` width whose gate and up are stored as one matrix, the gate first."""
    both: tuple[Part, ...] = (("outputs", inner), ("outputs", inner))
    return GatedMLP(
        build.linear({names[0]: 2 * inner}, build.config.hidden_size, bias=build.config.mlp_bias, split=both),
        build.linear({names[1]: build.config.hidden_size}, inner, bias=build.config.mlp_bias, split="inputs"),
        build.config.activation,
    )


class PlainMLP:
    """down(activation(up(x)))."""

    __slots__ = ("activation", "down", "up")

    def __init__(self, up: Linear, down: Linear, activation: str | Callable[[Tensor], Tensor]) -> None:
        """`activation`: a name, or a function of its own."""
        self.up = up
        self.down = down
        self.activation = activation

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """x [T, H] -> [T, H]."""
        if isinstance(self.activation, str):
            return self.down.after_activation(self.up(x), self.activation)
        return self.down(self.activation(self.up(x)))


def plain_mlp(
    build: Builder,
    names: Sequence[str],
    *,
    transposed: bool = False,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> PlainMLP:
    """An MLP without a gate; `names` are those of up and down. `transposed`: stored as [inputs, outputs]. `activation`
    is by default the config's."""
    config, (up, down) = build.config, names
    hidden, inner = config.hidden_size, config.intermediate_size
    return PlainMLP(
        build.linear({up: inner}, hidden, bias=config.mlp_bias, transposed=transposed, split="outputs"),
        build.linear({down: hidden}, inner, bias=config.mlp_bias, transposed=transposed, split="inputs"),
        activation or config.activation,
    )
