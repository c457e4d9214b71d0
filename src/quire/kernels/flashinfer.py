"""FlashInfer's paged attention (Ye et al., arXiv 2501.01005) in the place of Quire's own; all else is that of
`quire.kernels.triton`.

Its layout HND is that of the Triton kernels: keys and values [num_blocks, num_kv_heads, block_size, head_dim]. A
wrapper is planned on the host once a step for each way that layers attend, when the first such layer comes, and run by
every such layer. Written for FlashInfer 0.6.18. Importing this module imports FlashInfer and Triton.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flashinfer
import torch
from torch import Tensor

from quire.backends import FLASHINFER_WORKSPACE
from quire.errors import ConfigError
from quire.kernels.interface import AttentionPlan
from quire.kernels.triton import (
    add_rms_norm,
    copy_blocks,
    gather_rows,
    gather_rows_quantized,
    gelu_and_mul,
    kv_cache_shapes,
    linear,
    glu_linear,
    rms_norm_linear,
    linear_quantized,
    pack_linear,
    quantize_linear,
    quantize_rows,
    rms_norm,
    rms_norm_heads_,
    rotary_,
    rotary_write_kv,
    row_argmax,
    sample_tokens,
    silu_and_mul,
    write_kv,
)

__all__ = [
    "FlashInferPlan",
    "Wrappers",
    "add_rms_norm",
    "copy_blocks",
    "gather_rows",
    "gather_rows_quantized",
    "gelu_and_mul",
    "kv_cache_shapes",
    "linear",
    "glu_linear",
    "rms_norm_linear",
    "linear_quantized",
    "pack_linear",
    "paged_attention",
    "quantize_linear",
    "quantize_rows",
    "rms_norm",
    "rms_norm_heads_",
    "rotary_",
    "rotary_write_kv",
    "row_argmax",
    "sample_tokens",
    "silu_and_mul",
    "write_kv",
]

_HEAD_DIMS = (64, 128, 256)
# New tokens of each sequence up to which the template with split keys ("fa2") is asked for; more are FlashInfer's
# choice, on Hopper a template that does not split.
_MAX_SPLIT_TOKENS = 8


class _Variant(NamedTuple):
    """What a wrapper is planned for beside the step."""

    splits: bool
    scale: float
    window: int
    softcap: float
    activations: torch.dtype
    cache: torch.dtype


class Wrappers:
    """FlashInfer's wrappers and the workspace that they share."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, device: torch.device):
        if head_dim not in _HEAD_DIMS:
            raise ConfigError(
                f"the model's heads have {head_dim} dimensions; attention_backend flashinfer takes "
                f"{', '.join(map(str, _HEAD_DIMS))}: choose triton or sdpa"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self._workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
        # A plan is written to pinned memory and copied from there: the next one must not overwrite what is still to be
        # copied, so wrappers take turns. At most one step is pending while another is planned.
        self._turns: tuple[dict[_Variant, Any], ...] = ({}, {})
        self._turn = 0

    def next_turn(self) -> dict[_Variant, Any]:
        """The wrappers that the step before did not use."""
        self._turn = 1 - self._turn
        return self._turns[self._turn]

    def make(self, variant: _Variant) -> Any:
        backend = "fa2" if variant.splits else "auto"
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND", backend=backend)


@dataclass(frozen=True, slots=True)
class FlashInferPlan(AttentionPlan):
    """An AttentionPlan on the device, and on the host what wrappers are planned from (`quire.attention.flashinfer`)."""

    qo_indptr: Tensor
    """`query_start_loc` on the host."""
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor
    max_query_len: int
    wrappers: Wrappers
    turn: dict[_Variant, Any]
    """Wrappers that may be planned for this step."""
    planned: set[_Variant] = field(default_factory=set)
    """Those of `turn` that are."""

    def wrapper(self, variant: _Variant) -> Any:
        if variant not in self.turn:
            self.turn[variant] = self.wrappers.make(variant)
        wrapper = self.turn[variant]
        if variant not in self.planned:
            wrapper.plan(
                self.qo_indptr,
                self.kv_indptr,
                self.kv_indices,
                self.last_page_len,
                self.wrappers.num_heads,
                self.wrappers.num_kv_heads,
                self.wrappers.head_dim,
                self.wrappers.block_size,
                causal=True,
                sm_scale=variant.scale,
                window_left=variant.window - 1,  # positions before a token's own; -1: all
                logits_soft_cap=variant.softcap,
                q_data_type=variant.activations,
                kv_data_type=variant.cache,
                max_token_per_sequence=self.max_query_len,
            )
            self.planned.add(variant)
        return wrapper


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """q [T, num_heads, D], whose first dimension may have any stride -> [T, num_heads, D].

    FlashInfer's own scales are of a whole layer; those of heads are taken in before and after it.
    """
    assert isinstance(plan, FlashInferPlan), "made by quire.attention.planners"
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes: FlashInfer has none but its own; choose attention_backend triton or sdpa")
    splits = plan.max_query_len <= _MAX_SPLIT_TOKENS
    wrapper = plan.wrapper(_Variant(splits, scale, window, softcap, q.dtype, k_cache.dtype))
    if k_scale is not None:
        q = _scale_heads(q, k_scale)
    out: Tensor = wrapper.run(q, (k_cache, v_cache))
    return out if v_scale is None else _scale_heads(out, v_scale)


def _scale_heads(x: Tensor, scale: Tensor) -> Tensor:
    """x [T, num_heads, D] times the scale [num_kv_heads] of each head's KV head."""
    return (x * scale.repeat_interleave(x.shape[1] // len(scale))[:, None]).to(x.dtype)
