"""What every kernel module offers, and the plan its attention reads.

`reference` (plain PyTorch) is the specification; `cpu` and `triton` have the same names and signatures. The plan is
built once per step by the device's planner in `quire.attention` and lives here because kernels take it as an argument.

Shapes: T new tokens of all sequences, B sequences, H hidden size, D head_dim. Indices are int32. The KV cache of one
layer is a pair of tensors of blocks, laid out as the device multiplies them best; `kv_cache_shapes` says how:

              reference, cpu                                         triton
    k_cache   [num_blocks, num_kv_heads, head_dim, block_size]       [num_blocks, num_kv_heads, block_size, head_dim]
    v_cache   [num_blocks, num_kv_heads, block_size, head_dim]       [num_blocks, num_kv_heads, block_size, head_dim]

Of int8 on a CPU, a key and a value are whole numbers from -127 to 127 and a float32 scale each. The scales of a head's
block are 8 more rows of its keys, head_dim + 8 in all: the bytes of [2, block_size] float32, the keys' scales, then the
values'. So they go wherever the block goes.

A slot is `block * block_size + offset`; slot -1 means "write nothing". A cache of float8 may hold keys and values
divided by scales of their heads, `k_scale` and `v_scale` [num_kv_heads] float32: both or none, the same for writing and
for reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

KVShape = tuple[int, int, int, int]
Variant = tuple[int, ...]
"""What a planner tells captured steps of one size apart by."""

KV_SCALE_ROWS = 8
"""Rows of int8 keys that hold scales."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention as every device knows it. All tensors are contiguous, on the device, int32.

    What a device's planner found out beyond this is in a class of its own below this one.
    """

    query_start_loc: Tensor
    """[B + 1]: the new tokens of sequence s are rows query_start_loc[s] to query_start_loc[s + 1]."""
    seq_lens: Tensor
    """[B]: tokens of each sequence, the new ones included."""
    block_tables: Tensor
    """[B, max_blocks]: physical block of each logical block; entries past the end are never read."""
    slots: Tensor
    """[T]: where the keys and values of each new token go."""
    window: int
    """The plan left out keys that a window of this many positions never sees; 0: none left out."""

    @property
    def variant(self) -> Variant:
        """Plans for captured steps of one size make the same launches if they are of one variant."""
        return ()


@dataclass(frozen=True, slots=True)
class CpuAttentionPlan(AttentionPlan):
    """The plan of `quire.attention.plan`, balanced over threads."""

    work: Tensor
    """[num_items, 9]: the items threads take, costliest first; columns in `quire.attention.plan.WorkColumn`."""
    growth: list[tuple[NDArray[np.int32], NDArray[np.int32]]]
    """Columns of `work` and `shared`, and what one more token of every sequence adds to them."""
    shared: Tensor
    """[any, 3]: tokens of the items that serve several sequences; columns in `quire.attention.plan.SharedColumn`."""
    merges: Tensor
    """[num_merges, 4]: runs of tokens with partial results; columns in `quire.attention.plan.MergeColumn`."""
    partials: Tensor
    """[num_rows, head_dim + 2] float32: scratch for split results, with the maximum and sum of each row's softmax."""
    num_threads: int
    """The number of threads the work was balanced for."""


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """The tokens whose hidden states are read, if not all: what the last layer computes beyond keys and values."""

    tokens: Tensor
    """[R], R > 0: rows of the step's T tokens, ascending; of each sequence its last few or none."""
    plan: AttentionPlan | None
    """The attention of these tokens by themselves; None: what all tokens' gives is chosen from."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The weight of a dense layer as whole numbers of few bits and float32 scales. How both lie is the kernels' own
    affair; in `reference` they are values [N, K] int8 and scales [N, groups]."""

    values: Tensor
    scales: Tensor
    bits: int
    """8 or 4."""
    group_size: int
    """Inputs that share a scale: a multiple of 32, or at least K, which makes it one scale for each output."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


PackedWeight = Tensor | QuantizedWeight
"""What `pack_linear` or `quantize_linear` made."""


class Kernels(Protocol):
    """The operations of one device. What each computes is written in `reference`; a module satisfies this protocol."""

    def kv_cache_shapes(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, *, scaled: bool = False
    ) -> tuple[KVShape, KVShape]: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def rms_norm_heads_(self, x: Tensor, weight: Tensor, eps: float) -> None: ...

    def rotary_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None: ...

    def silu_and_mul(self, x: Tensor) -> Tensor: ...

    def gelu_and_mul(self, x: Tensor, tanh: bool) -> Tensor: ...

    def write_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None: ...

    def rotary_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None: ...

    def copy_blocks(self, caches: Sequence[tuple[Tensor, Tensor]], pairs: Tensor) -> None: ...

    def pack_linear(self, weights: Sequence[Tensor], dtype: str) -> Tensor: ...

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor: ...

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def quantize_linear(self, weights: Sequence[Tensor], bits: int, group_size: int) -> QuantizedWeight: ...

    def linear_quantized(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, num_outputs: int) -> Tensor: ...

    def rms_norm_linear(
        self,
        residual: Tensor,
        update: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        packed: PackedWeight,
        bias: Tensor | None,
        num_outputs: int,
    ) -> Tensor: ...

    def glu_linear(
        self, x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int
    ) -> Tensor: ...

    def gather_rows(self, packed: Tensor, ids: Tensor, num_inputs: int) -> Tensor: ...

    def gather_rows_quantized(self, weight: QuantizedWeight, ids: Tensor, num_inputs: int) -> Tensor: ...

    def paged_attention(
        self,
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
    ) -> Tensor: ...

    def row_argmax(self, x: Tensor, peaks: Tensor, ids: Tensor) -> None: ...

    def sample_tokens(
        self,
        x: Tensor,
        temperatures: Tensor,
        min_p: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        uniforms: Tensor,
        peaks: Tensor,
        ids: Tensor,
    ) -> None: ...
