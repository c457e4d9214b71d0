"""Attention of one layer over its part of the KV cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from quire.kernels import AttentionParams, AttentionPlan, Kernels, KVLayer, OutputTokens


class KVLayers(Protocol):
    """The KV cache as a model sees it."""

    @property
    def layers(self) -> Sequence[KVLayer]: ...


class Attention:
    """Writes the new keys and values to their slots, then lets the new queries read all they may see. With
    `cos_sin`, the table of a rotary embedding, queries and keys are first rotated by their positions. Keys and values
    are stored divided by `k_scale` and `v_scale` [num_kv_heads], where these are set."""

    __slots__ = ("cos_sin", "k_scale", "kernels", "params", "v_scale")

    def __init__(
        self, kernels: Kernels, *, scale: float, cos_sin: Tensor | None = None, window: int = 0, softcap: float = 0.0
    ) -> None:
        self.kernels = kernels
        self.cos_sin = cos_sin
        self.params = AttentionParams(scale, window, softcap)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer_kv: KVLayer,
        plan: AttentionPlan,
        positions: Tensor | None = None,
        output_tokens: OutputTokens | None = None,
    ) -> Tensor:
        """q [T, num_heads, D], k, v [T, num_kv_heads, D], positions [T] int32 -> [T, num_heads, D], or of the R tokens
        that are read [R, num_heads, D].

        With a rotary embedding q and k are overwritten, and positions must be given.
        """
        if self.k_scale is not None:
            layer_kv = replace(layer_kv, k_scale=self.k_scale, v_scale=self.v_scale)
        if self.cos_sin is None:
            self.kernels.write_kv(k, v, layer_kv, plan.slots)
        else:
            assert positions is not None
            self.kernels.rotary_write_kv(q, k, v, positions, self.cos_sin, layer_kv, plan.slots)
        if output_tokens is not None and output_tokens.plan is not None:
            q, plan, output_tokens = q[output_tokens.tokens], output_tokens.plan, None
        out = self.kernels.paged_attention(q, layer_kv, plan, self.params)
        return out if output_tokens is None else out[output_tokens.tokens]
