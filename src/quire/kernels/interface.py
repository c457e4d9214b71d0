"""The protocol that every kernel module satisfies, and the records that its operations take.

`reference` (plain PyTorch) is the specification; `cpu`, `triton` and `sdpa` have the same names and signatures. The
device's planner in `quire.attention` builds an attention plan once per step; its class is here because kernels take it.

Shapes: T new tokens of all sequences, B sequences, H hidden size, D head_dim. Indices are int32. The KV cache of one
layer is a `KVLayer`: two tensors of blocks, laid out as the device multiplies them best. `kv_cache_shapes` gives both:

             reference, cpu                                         triton, sdpa
    keys     [num_blocks, num_kv_heads, head_dim, block_size]       [num_blocks, num_kv_heads, block_size, head_dim]
    values   [num_blocks, num_kv_heads, block_size, head_dim]       [num_blocks, num_kv_heads, block_size, head_dim]

An int8 cache exists on the CPU only. It stores each key and each value as integers from -127 to 127 and one float32
scale. The scales lie behind the keys of their block, in 8 extra rows per head (head_dim + 8 in all). These rows are the
bytes of a [2, block_size] float32 array: the keys' scales, then the values'. So scales move with their block.

A latent layer stores one row a token, without values: a value is the last `value_dim` elements of its key. A slot is
`block * block_size + offset`; slot -1 means "write nothing".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.block_matrix import BlockMatrix, BlockWeight
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.lora import LoraRows, LoraWeights
from quire.kernels.recurrent_plan import RecurrentPlan
from quire.quantization import WeightFormat

KVShape = tuple[int, int, int, int]
Variant = tuple[int, ...]
"""Distinguishes captured steps of one size whose launches differ."""

KV_SCALE_ROWS = 8
"""Extra rows per head and block of int8 keys, which hold scales."""


@dataclass(frozen=True, slots=True)
class KVLayer:
    """KV cache of one layer."""

    keys: Tensor
    values: Tensor
    """In a latent layer a view of the last elements of every key (`Kernels.latent_layer`)."""
    k_scale: Tensor | None = None
    """[num_kv_heads] float32, float8 caches only: keys are divided by it when written, multiplied by it when read."""
    v_scale: Tensor | None = None
    """The same for values; set if and only if `k_scale` is."""
    is_latent: bool = field(default=False, kw_only=True)
    """Only keys are stored and written."""
    group: int = field(default=0, kw_only=True)
    """The layer's KV group: it reads that group's attention plan."""


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a layer's attention computes, beside its inputs."""

    scale: float
    """Factor of the scores."""
    window: int = 0
    """Number of latest positions that a token sees, its own included; 0: all."""
    softcap: float = 0.0
    """If above 0, a score s becomes softcap * tanh(s / softcap)."""
    alibi_slopes: Tensor | None = None
    """[num_heads] float32: slope * (key position - query position) is added to each score."""
    sinks: Tensor | None = None
    """[num_heads] float32: one more score in the softmax of every token, whose key has no value."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Attention of one step, as every device needs it. All tensors are contiguous, on the device, int32. A device's own
    plan is a subclass."""

    query_start_loc: Tensor
    """[B + 1]: the new tokens of sequence s are rows query_start_loc[s] to query_start_loc[s + 1]."""
    seq_lens: Tensor
    """[B]: tokens of each sequence, the new ones included. In the CPU's plan of an encoder, plus the positions after
    its own that a token sees."""
    block_tables: Tensor
    """[B, max_blocks]: physical block of each logical block; entries past the end are never read."""
    slots: Tensor
    """[T]: where the keys and values of each new token are stored."""
    window: int
    """If above 0, the plan leaves out keys that a window of this many positions never sees."""

    @property
    def variant(self) -> Variant:
        """Plans for captured steps of one size make the same launches if their variants are equal."""
        return ()


@dataclass(frozen=True, slots=True)
class ExpandedRun:
    """Many new tokens of one sequence with latent rows, for which the keys and values of heads are computed."""

    tokens: slice
    """Rows of q."""
    blocks: Tensor
    """[n] int64: the blocks of the sequence."""
    plan: "CpuAttentionPlan"
    """For one head, over keys and values that lie in blocks 0 to n - 1. Its `slots` are those of all tokens."""


@dataclass(frozen=True, slots=True)
class CpuAttentionPlan(AttentionPlan):
    """The plan of `quire.attention.plan`, balanced over threads."""

    work: Tensor
    """[num_items, 9]: the items that threads take, costliest first; columns in `quire.attention.plan.WorkColumn`."""
    growth: list[tuple[NDArray[np.int32], NDArray[np.int32]]]
    """Columns of `work` and `shared`, and what one more token of every sequence adds to them."""
    shared: Tensor
    """[any, 3]: tokens of the items that serve several sequences; columns in `quire.attention.plan.SharedColumn`."""
    merges: Tensor
    """[num_merges, 4]: runs of tokens with partial results; columns in `quire.attention.plan.MergeColumn`."""
    partials: Tensor
    """[num_rows, value_dim + 2] float32: scratch for split results, with the maximum and sum of each row's softmax."""
    num_threads: int
    """The number of threads that the work was balanced for."""
    expanded: Sequence[ExpandedRun] = ()
    """Tokens that `work` leaves out; their rows of the output are not written."""


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """The tokens whose hidden states a step returns. The last layer computes only keys and values of the others."""

    tokens: Tensor
    """[R], R > 0: rows of the step's T tokens, ascending; the last few or none of each sequence."""
    plan: AttentionPlan | None
    """A plan for these tokens alone; None: the last layer attends with all tokens, then selects these rows."""


@dataclass(frozen=True, slots=True)
class StateLayer:
    """Recurrent state of one layer, an entry for each state slot. float32, since rounding would add up."""

    conv: Tensor
    """[num_slots, width - 1, channels]: the latest inputs of the causal convolution, the oldest first."""
    recurrent: Tensor
    """[num_slots, num_heads, key_dim, value_dim]"""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Weight of a dense layer as integers of few bits, in groups of inputs. A group has a scale and, with 4 bits, an
    offset. Each kernel module has its own layout; in `reference` values are [N, K] int8 and
    scales float32: [N, groups], or with 4 bits [N, groups, 2], the offset before the scale."""

    values: Tensor
    scales: Tensor
    stored: WeightFormat

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


LowBitWeight = QuantizedWeight | BlockWeight
PackedWeight = Tensor | LowBitWeight | CodedWeight
"""Result of `pack_linear`, `quantize_linear`, `pack_coded` or `pack_blocks`."""

MXFP4_BLOCK = 32
"""Inputs that share a scale in MXFP4."""


class Mxfp4Matrix(NamedTuple):
    """A matrix [N, K] in MXFP4, as stored: numbers of 4 bits (e2m1), and a power of two for every 32 inputs."""

    blocks: Tensor
    """[N, K / 32, 16] uint8: two inputs a byte, the first in the low half."""
    scales: Tensor
    """[N, K / 32] uint8: e, for 2^(e - 127)."""


ExpertMatrix = Tensor | Mxfp4Matrix | CodedMatrix | BlockMatrix
"""A matrix [N, K] of one expert as a checkpoint stores it."""
ExpertMatrices = Sequence[Sequence[ExpertMatrix]]
"""One dense layer of all experts: for each expert the matrices [N_i, K] whose outputs lie side by side."""
ExpertWeight = PackedWeight
"""Result of `pack_experts`: tensors of one packed weight, with a first dimension of experts."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The gated MLPs of all E experts of a layer, each of I inner elements."""

    gate_up: ExpertWeight
    """[2 I, H] each: the gate, then what it multiplies."""
    down: ExpertWeight
    """[H, I] each, stored like `gate_up`."""
    gate_up_bias: Tensor | None
    """[E, 2 I] float32"""
    down_bias: Tensor | None
    """[E, H] float32"""
    num_experts: int
    num_inner: int
    activation: str
    """silu, gelu, gelu_tanh, relu or clamped_swiglu."""


class DenseWeight(NamedTuple):
    """A dense layer."""

    packed: PackedWeight
    bias: Tensor | None
    """[num_outputs] float32"""
    num_outputs: int


class LayerNormWeight(NamedTuple):
    """A LayerNorm of rows of H."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class PostNormWeights(NamedTuple):
    """A layer of an encoder whose norms follow the additions."""

    qkv: DenseWeight
    """Queries, keys and values side by side."""
    o: DenseWeight
    attention_norm: LayerNormWeight
    up: DenseWeight
    activation: str
    """silu, gelu, gelu_tanh, relu or relu2."""
    down: DenseWeight
    mlp_norm: LayerNormWeight


class Allocate(Protocol):
    """Returns zeroed memory for a packed weight: `torch.zeros`, or memory that the caller has reserved."""

    def __call__(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor: ...


class Packing(Protocol):
    """Makes the packed weight of a dense layer. `allocate` is used where the packed layout differs from the stored one;
    other kernels ignore it."""

    def pack_linear(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = ...) -> Tensor: ...

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = ...
    ) -> QuantizedWeight: ...

    def pack_coded(self, matrices: Sequence[CodedMatrix], allocate: Allocate = ...) -> CodedWeight: ...

    def pack_blocks(self, matrices: Sequence[BlockMatrix]) -> LowBitWeight: ...

    def pack_experts(
        self, matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = ...
    ) -> ExpertWeight: ...


class Kernels(Packing, Protocol):
    """The operations of one device; a module satisfies it. `reference` specifies what each computes."""

    def describe(self) -> str:
        """The build in use, for logs and cache keys."""
        ...

    def kv_cache_shapes(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, *, scaled: bool = False
    ) -> tuple[KVShape, KVShape]: ...

    def latent_layer(self, keys: Tensor, value_dim: int) -> KVLayer:
        """The layer whose keys are `keys`, of a shape of `kv_cache_shapes`, and whose values are part of them."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def layer_norm(
        self, residual: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor: ...

    def rms_norm_heads_(self, x: Tensor, weight: Tensor, eps: float) -> None: ...

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None: ...

    def rotary_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None: ...

    def rotary_write_kv(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, kv: KVLayer, slots: Tensor
    ) -> None: ...

    def copy_blocks(self, layers: Sequence[KVLayer], pairs: Tensor) -> None: ...

    def paged_attention(self, q: Tensor, kv: KVLayer, plan: AttentionPlan, params: AttentionParams) -> Tensor: ...

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: StateLayer, plan: RecurrentPlan
    ) -> Tensor: ...

    def gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor | None,
        state: StateLayer,
        plan: RecurrentPlan,
    ) -> Tensor: ...

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor: ...

    def linear_quantized(self, x: Tensor, weight: LowBitWeight, bias: Tensor | None, num_outputs: int) -> Tensor: ...

    def linear_coded(self, x: Tensor, weight: CodedWeight, bias: Tensor | None, num_outputs: int) -> Tensor: ...

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

    def activation_linear(
        self, x: Tensor, activation: str, packed: PackedWeight, bias: Tensor | None, num_outputs: int
    ) -> Tensor: ...

    def post_norm_layers_(
        self,
        x: Tensor,
        layers: Sequence[PostNormWeights],
        num_heads: int,
        kv: KVLayer,
        plan: AttentionPlan,
        params: AttentionParams,
    ) -> None:
        """Runs all layers of an encoder, in place: `post_norm.layer_after_layer` says what it computes. Weights are
        floats or quantised, not codes or blocks; attention has neither slopes nor sinks."""
        ...

    def experts(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: PackedExperts, out: Tensor) -> None: ...

    LORA_TILE: int
    """The most rows of a tile of `LoraRows`."""

    def add_lora(self, out: Tensor, x: Tensor, rows: LoraRows, weights: LoraWeights) -> None: ...

    def gather_rows(self, packed: Tensor, ids: Tensor, num_inputs: int) -> Tensor: ...

    def gather_rows_quantized(self, weight: LowBitWeight, ids: Tensor, num_inputs: int) -> Tensor: ...

    def row_argmax(self, x: Tensor, peaks: Tensor, ids: Tensor) -> None:
        """Like `sample_tokens`, on logits in host memory."""
        ...

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
    ) -> None:
        """On logits in host memory. A GPU samples in device memory by `Backend.sampling` where that can serve a row."""
        ...
