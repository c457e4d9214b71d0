"""LatentAttention: multi-head attention over one row a token that all heads share (MLA).

T new tokens of all sequences, R output tokens, H hidden size, L latent width.

A head's key is a rotated part that all heads share, and a matrix of the head times the latent; its value is another
matrix times the latent. Usually neither is made: the first matrix is applied to the query instead, and the second to
the output of attention (the "absorbed" form). So attention reads the rows that the cache holds, whose last L elements
are also their values, and the cache needs no keys and values of heads. Many new tokens of one sequence are the
exception (`quire.attention.expansion`).
"""

import torch
from torch import Tensor

from quire.kernels.interface import CpuAttentionPlan
from quire.layers.attention import Attention
from quire.layers.linear import Linear, LinearWeight
from quire.layers.norm import Norm, Normed
from quire.layers.rotary import half_layout
from quire.layers.step_context import StepContext
from quire.model_config.latent import LatentShape
from quire.models.blocks import rows_of_heads
from quire.models.builder import Builder
from quire.models.expanded_attention import attend_expanded
from quire.models.kv_scales import largest_projected, largest_rotated, scales_of

CPU = torch.device("cpu")
LATENT_NORM_EPS = 1e-6
"""The norms of latents have it whatever rms_norm_eps is."""


class LatentAttention:
    """Causal attention. Queries may have a latent of their own."""

    def __init__(
        self,
        shape: LatentShape,
        down: Linear,
        queries: tuple[Tensor, Linear] | None,
        latent_norm: Tensor,
        heads: tuple[list[Linear], list[Linear]],
        attend: Attention,
        o: Linear,
    ) -> None:
        """`down` makes queries and the row of a token, or the latent of queries and the row, side by side. `queries`
        are then the norm and the layer between. `heads`: for each head what is applied to its query, and to its output.
        """
        self.shape = shape
        self.down = down
        self.queries = queries
        self.latent_norm = latent_norm
        self.key_up, self.value_up = heads
        self.attend = attend
        self.o = o

    def __call__(self, x: Tensor | Normed, context: StepContext) -> Tensor:
        """x [T, H] -> [T, H], or [R, H] of the output tokens."""
        shape, kernels = self.shape, self.attend.kernels
        projected = self.down(x)
        queries, rows = projected.split_with_sizes((projected.shape[1] - shape.row_dim, shape.row_dim), dim=1)
        rows = rows.unsqueeze(1)
        latents = rows[..., shape.rope_dim :]
        kernels.rms_norm_heads_(latents, self.latent_norm, LATENT_NORM_EPS)
        if self.queries is not None:
            norm, up = self.queries
            queries = up(kernels.rms_norm(queries, norm, LATENT_NORM_EPS))
        queries = queries.unflatten(1, (-1, shape.head_dim))
        absorbed = self._absorb(queries)
        attended = self.attend(absorbed, rows, latents, context)
        outputs = torch.cat([up(attended[:, head]) for head, up in enumerate(self.value_up)], dim=1)
        self._expand(queries, absorbed, outputs, context)
        return self.o(outputs)

    def _expand(self, queries: Tensor, absorbed: Tensor, outputs: Tensor, context: StepContext) -> None:
        """Overwrite the outputs [R, heads x value elements] of the tokens that the plan leaves out. `absorbed` holds
        the rotated elements of the queries."""
        kv, output_tokens = context.kv_layers[self.attend.layer], context.output_tokens
        plan = context.attention[kv.group]
        own = None if output_tokens is None else output_tokens.plan
        used = plan if own is None else own
        if not isinstance(used, CpuAttentionPlan) or not used.expanded:
            return
        rope_dim = self.shape.rope_dim
        rotated = torch.cat((absorbed[..., :rope_dim], queries[..., rope_dim:]), dim=2)
        if output_tokens is None:
            chosen = torch.arange(len(queries))
        elif own is None:
            chosen = output_tokens.tokens.long()
        else:
            rotated, chosen = rotated[output_tokens.tokens], torch.arange(len(outputs))
        for run in used.expanded:
            inside = (chosen >= run.tokens.start) & (chosen < run.tokens.stop)
            found = attend_expanded(
                self.attend.kernels, rotated[run.tokens], kv, run, self.attend.params, self.key_up, self.value_up
            )
            outputs[inside] = found[chosen[inside] - run.tokens.start]

    def _absorb(self, queries: Tensor) -> Tensor:
        """queries [T, heads, rotated and other elements] -> [T, heads, elements of a row]."""
        rope_dim = self.shape.rope_dim
        absorbed = queries.new_empty(*queries.shape[:2], self.shape.row_dim)
        absorbed[..., :rope_dim] = queries[..., :rope_dim]
        for head, up in enumerate(self.key_up):
            absorbed[:, head, rope_dim:] = up(queries[:, head, rope_dim:])
        return absorbed

    def scale_kv(self, norm: Norm) -> None:
        """Scale rows for a cache of float8 from now on, by the least scale with which no element overflows. `norm` is
        that of the block's input."""
        assert norm.weight is not None, "every family with latent attention has norms before it"
        rope_dim = self.shape.rope_dim
        rows = largest_projected(self.down, norm.weight, norm.bias)[-self.shape.row_dim :]
        rotated = largest_rotated(rows[None, :rope_dim], self.attend.cos_sin)
        latents = self.latent_norm.abs()[None] * self.shape.latent_dim**0.5
        scale = scales_of(torch.cat((rotated, latents), dim=1))
        self.attend.k_scale, self.attend.v_scale = scale, scale


def latent_attention(build: Builder, layer: int, cos_sin: Tensor | None) -> LatentAttention:
    """The attention of a layer, with DeepSeek's names."""
    config, shape = build.config, build.config.latent
    assert shape is not None
    take, heads, hidden = build.weights.take_linear, config.num_heads, config.hidden_size
    rope = config.rope
    interleaved = rope is not None and rope.layout == "interleaved"
    pairs = half_layout(shape.rope_dim, shape.rope_dim, CPU) if interleaved else torch.arange(shape.rope_dim)
    of_query = torch.cat((shape.nope_dim + pairs, torch.arange(shape.nope_dim)))
    of_row = torch.cat((shape.latent_dim + pairs, torch.arange(shape.latent_dim)))

    num_queries = heads * shape.head_dim
    row = take("kv_a_proj_with_mqa", (shape.row_dim, hidden), bias=config.qkv_bias).select_rows(of_row)
    if shape.query_latent_dim:
        first = take("q_a_proj", (shape.query_latent_dim, hidden), bias=config.qkv_bias)
        norm = build.weights.take("q_a_layernorm.weight", (shape.query_latent_dim,)).float()
        up = take("q_b_proj", (num_queries, shape.query_latent_dim), split="outputs")
        up = up.select_rows(rows_of_heads(of_query, num_queries))
        queries = norm, build.pack(up)
    else:
        first = take("q_proj", (num_queries, hidden), split="outputs")
        first = first.select_rows(rows_of_heads(of_query, num_queries))
        queries = None
    return LatentAttention(
        shape,
        build.pack(first, row),
        queries,
        build.weights.take("kv_a_layernorm.weight", (shape.latent_dim,)).float(),
        _head_layers(build, shape),
        Attention(build.kernels, layer, scale=config.attention_scale, cos_sin=cos_sin),
        build.linear({"o_proj": hidden}, heads * shape.value_dim, bias=config.o_bias, split="inputs"),
    )


def _head_layers(build: Builder, shape: LatentShape) -> tuple[list[Linear], list[Linear]]:
    """For each head the layer from the unrotated part of a query to a latent, and the one from a latent to a value."""
    sizes = (shape.nope_dim, shape.value_dim)
    num_rows = build.config.num_heads * sum(sizes)
    stored = build.weights.take_matrix("kv_b_proj", (num_rows, shape.latent_dim), split="outputs")
    keys, values = stored.view(-1, sum(sizes), shape.latent_dim).split_with_sizes(sizes, dim=1)
    return (
        [build.pack(LinearWeight(key.t())) for key in keys],
        [build.pack(LinearWeight(value)) for value in values],
    )
