"""Attention of one layer over its part of the KV cache."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quire.kernels import AttentionPlan, Kernels, OutputTokens

LayerKV = tuple[Tensor, Tensor]
"""k_cache and v_cache of one layer; `quire.kernels.interface` has their layout."""


class KVLayers(Protocol):
    """The KV cache as a model sees it."""

    @property
    def layers(self) -> Sequence[LayerKV]: ...


class Attention:
    """Writes the new keys and values to their slots, then lets the new queries read all they may see. With
    `cos_sin`, the table of a rotary embedding, queries and keys are first rotated by their positions. Keys and values
    are stored divided by `k_scale` and `v_scale` [num_kv_heads], where these are set."""

    __slots__ = ("cos_sin", "k_scale", "kernels", "scale", "softcap", "v_scale", "window")

    def __init__(
        self, kernels: Kernels, *, scale: float, cos_sin: Tensor | None = None, window: int = 0, softcap: float = 0.0
    ) -> None:
        self.kernels = kernels
        self.cos_sin = cos_sin
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer_kv: LayerKV,
        plan: AttentionPlan,
        positions: Tensor | None = None,
        output_tokens: OutputTokens | None = None,
    ) -> Tensor:
        """q [T, num_heads, D], k, v [T, num_kv_heads, D], positions [T] int32 -> [T, num_heads, D], or of the R tokens
        that are read [R, num_heads, D].

        With a rotary embedding q and k are overwritten, and positions must be given.
        """
        k_cache, v_cache = layer_kv
        if self.cos_sin is None:
            self.kernels.write_kv(k, v, k_cache, v_cache, plan.slots, k_scale=self.k_scale, v_scale=self.v_scale)
        else:
            assert positions is not None
            self.kernels.rotary_write_kv(
                q,
                k,
                v,
                positions,
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
