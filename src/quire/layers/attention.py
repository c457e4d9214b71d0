"""Attention of one layer over its part of the KV cache."""

from dataclasses import replace

from torch import Tensor

from quire.kernels import AttentionParams, Kernels
from quire.layers.step_context import StepContext


class Attention:
    """Write the new keys and values to their slots, then let the new queries attend to all keys they may see.

    `layer` is the index of its part of the KV cache. With `cos_sin`, the table of a rotary embedding, queries and keys
    are first rotated by their positions. With `query_scales` [num_positions] a query is multiplied by its position's
    entry. Keys and values are stored divided by `k_scale` and `v_scale` [num_kv_heads] where these are set.
    """

    __slots__ = ("cos_sin", "k_scale", "kernels", "layer", "params", "query_scales", "v_scale")

    def __init__(
        self,
        kernels: Kernels,
        layer: int,
        *,
        scale: float,
        cos_sin: Tensor | None = None,
        window: int = 0,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        query_scales: Tensor | None = None,
    ) -> None:
        self.kernels = kernels
        self.layer = layer
        self.cos_sin = cos_sin
        self.params = AttentionParams(scale, window, softcap, alibi_slopes, sinks)
        self.query_scales = query_scales
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: StepContext) -> Tensor:
        """q [T, num_heads, D], k, v [T, num_kv_heads, D] -> [T, num_heads, D], or [R, num_heads, D] of the R output
        tokens.

        With a rotary embedding q and k are overwritten, with `query_scales` q is.
        """
        kv = context.kv_layers[self.layer]
        if self.k_scale is not None:
            kv = replace(kv, k_scale=self.k_scale, v_scale=self.v_scale)
        plan, output_tokens = context.attention[kv.group], context.output_tokens
        if self.cos_sin is None:
            self.kernels.write_kv(k, v, kv, plan.slots)
        else:
            positions, cos_sin = context.rotary_rows or (context.positions, self.cos_sin)
            self.kernels.rotary_write_kv(q, k, v, positions, cos_sin, kv, plan.slots)
        if self.query_scales is not None:
            q.mul_(self.query_scales[context.positions].to(q.dtype)[:, None, None])
        if output_tokens is not None and output_tokens.plan is not None:
            q, plan, output_tokens = q[output_tokens.tokens], output_tokens.plan, None
        out = self.kernels.paged_attention(q, kv, plan, self.params)
        return out if output_tokens is None else out[output_tokens.tokens]
