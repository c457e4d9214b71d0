"""Attention of one layer over its part of the KV cache."""

from torch import Tensor

from quire.kernels import Kernels
from quire.layers.step_context import StepContext


class Attention:
    """Write the new keys and values to their slots, then let the new queries attend to all keys they may see.

    `layer` is the index of its part of the KV cache. With `cos_sin`, the table of a rotary embedding, queries and keys
    are first rotated by their positions. Keys and values are stored divided by `k_scale` and `v_scale` [num_kv_heads]
    where these are set.
    """

    __slots__ = ("cos_sin", "k_scale", "kernels", "layer", "scale", "softcap", "v_scale", "window")

    def __init__(
        self,
        kernels: Kernels,
        layer: int,
        *,
        scale: float,
        cos_sin: Tensor | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        self.kernels = kernels
        self.layer = layer
        self.cos_sin = cos_sin
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: StepContext) -> Tensor:
        """q [T, num_heads, D], k, v [T, num_kv_heads, D] -> [T, num_heads, D], or [R, num_heads, D] of the R output
        tokens.

        With a rotary embedding q and k are overwritten.
        """
        k_cache, v_cache = context.kv_layers[self.layer]
        plan, output_tokens = context.attention, context.output_tokens
        if self.cos_sin is None:
            self.kernels.write_kv(k, v, k_cache, v_cache, plan.slots, k_scale=self.k_scale, v_scale=self.v_scale)
        else:
            self.kernels.rotary_write_kv(
                q,
                k,
                v,
                context.positions,
                self.cos_sin,
                k_cache,
                v_cache,
                plan.slots,
                k_scale=self.k_scale,
                v_scale=self.v_scale,
            )
        if output_tokens is not None and output_tokens.plan is not None:
            q, plan, output_tokens = q[output_tokens.tokens], output_tokens.plan, None
        out = self.kernels.paged_attention(
            q,
            k_cache,
            v_cache,
            plan,
            self.scale,
            window=self.window,
            softcap=self.softcap,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )
        return out if output_tokens is None else out[output_tokens.tokens]
