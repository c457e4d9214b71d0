"""ModelSpec: a model as plain values, one LayerSpec for each decoder layer, and the sums over them.

A family tells its layers: dense layers with their shapes, norms and biases, what a token leaves in the KV cache, the
state of a recurrent layer, and experts. Every size that must be known before a weight is read is a sum over these
values: parameters, memory of weights, activations, KV and states, and what a step reads and computes. The memory plan,
the planner and the simulator all ask here. No torch.

Names are Quire's own, not the checkpoint's; a layer that is packed from several tensors is one `LinearSpec`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from quire.dtypes import DTYPE_BYTES, FLOAT32_BYTES, KV_DTYPE_BYTES
from quire.quantization import METHODS, WeightFormat
from quire.quantization.levels import MXFP4_BLOCK
from quire.quantization.stored import KeptBits

RECURRENT_CHUNK = 64
"""Tokens of a recurrent layer that are computed as one product; work inside a chunk grows with its square."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A dense layer, or a table that only gives rows: a matrix [num_outputs, num_inputs]."""

    name: str
    num_outputs: int
    num_inputs: int
    quantizes: bool = True
    """False: a quantisation leaves it in float32. Routers of experts are such layers."""
    is_mxfp4: bool = False
    """It keeps the bits of a checkpoint in MXFP4, whatever other layers are stored as."""

    @property
    def num_parameters(self) -> int:
        return self.num_outputs * self.num_inputs

    def weight_bytes(self, dtype: str, weight_format: WeightFormat | None = None) -> int:
        """Memory of the matrix in `dtype`, or in the format of a quantisation."""
        if self.is_mxfp4:
            return self.num_parameters // 2 + self.num_parameters // MXFP4_BLOCK
        if weight_format is None:
            return self.num_parameters * DTYPE_BYTES[dtype]
        if not self.quantizes:
            return self.num_parameters * FLOAT32_BYTES
        return weight_format.weight_bytes(self.num_outputs, self.num_inputs)


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """The weight of a norm, or a bias: float32 whatever the dtype."""

    name: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """What a token leaves in the KV cache of one layer.

    A latent layer keeps one row for all query heads, the key; its last `value_dim` elements are the value.
    """

    kind: Literal["full", "window", "latent"] = "full"
    num_heads: int
    """KV heads."""
    key_dim: int
    value_dim: int
    """Elements of a key and of a value, per head."""
    window: int = 0
    """Positions that a token attends to, itself included; 0 for all. Blocks outside the window are given back."""

    @property
    def num_elements(self) -> int:
        """Elements that one token keeps."""
        return self.num_heads * (self.key_dim if self.kind == "latent" else self.key_dim + self.value_dim)

    def bytes_per_token(self, dtype: str) -> int:
        """Memory of one token's keys and values; in int8 each has a float32 scale per head."""
        scales = 2 * self.num_heads * FLOAT32_BYTES if dtype == "int8" else 0
        return self.num_elements * KV_DTYPE_BYTES[dtype] + scales


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of one layer: `linears` in the order of computation, the output projection last."""

    linears: tuple[LinearSpec, ...]
    num_heads: int
    """Query heads."""
    kv: KVSpec

    @property
    def num_elements(self) -> int:
        """Elements that attention passes on for one token: queries, keys, values, and its output."""
        latents = self.num_heads * self.kv.value_dim if self.kv.kind == "latent" else 0
        return _passed_on(self.linears) + latents

    @property
    def operations_per_pair(self) -> int:
        """Multiplications and additions for one (query, key) pair: the score and the share of the value."""
        return 2 * self.num_heads * (self.kv.key_dim + self.kv.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentSpec:
    """A recurrent layer in the place of attention. It leaves nothing in the KV cache; a sequence has one state of
    constant size instead: the latest inputs of a causal convolution, and a matrix for each head."""

    linears: tuple[LinearSpec, ...]
    """In the order of computation, the output projection last."""
    num_channels: int
    """Channels of the convolution."""
    conv_width: int
    num_heads: int
    key_dim: int
    value_dim: int
    """A head's state is a matrix [key_dim, value_dim]."""

    @property
    def kv(self) -> None:
        return None

    @property
    def num_state_elements(self) -> int:
        """Elements of one sequence's state; they are float32."""
        return (self.conv_width - 1) * self.num_channels + self.num_heads * self.key_dim * self.value_dim

    @property
    def num_elements(self) -> int:
        """Elements that the layer holds for one token at its peak: its products, the convolution before and after, and
        the chunks: queries, keys and values twice each, the system's sides and solution, and three square matrices."""
        vectors = 6 * self.key_dim + 5 * self.value_dim + 4 * RECURRENT_CHUNK
        return _passed_on(self.linears) + 3 * self.num_channels + self.num_heads * vectors

    @property
    def operations_per_pair(self) -> int:
        """A token attends to no other token."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """A feed-forward network: up and down, or gate and up as one layer, and down."""

    kind: Literal["gated", "plain"]
    linears: tuple[LinearSpec, ...]

    @property
    def num_parameters(self) -> int:
        return sum(linear.num_parameters for linear in self.linears)

    @property
    def num_elements(self) -> int:
        """Elements that it passes on for one token: the input of the activation and its output."""
        return _passed_on(self.linears)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts: the router sends every token to `num_active` of `num_experts` networks of one shape."""

    num_experts: int
    num_active: int
    router: LinearSpec
    expert: MLPSpec
    """One of the experts."""
    shared: MLPSpec | None = None
    """A network that every token passes as well."""

    def num_read(self, num_tokens: int) -> int:
        """Experts that a step of `num_tokens` reads at most: each token's own, until they are all."""
        return min(self.num_experts, num_tokens * self.num_active)

    @property
    def always_read(self) -> tuple[LinearSpec, ...]:
        """The dense layers that every token passes: router and shared network."""
        return (self.router, *(self.shared.linears if self.shared is not None else ()))

    @property
    def num_elements(self) -> int:
        """Elements passed on for one token: the router's logits, and for each active expert its copy of the token's
        row, its inner elements and its output row."""
        routed = self.num_active * (2 * self.router.num_inputs + self.expert.num_elements)
        return self.num_experts + routed + (self.shared.num_elements if self.shared is not None else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: attention or what stands in its place, then an MLP or experts; `vectors` are all its norms,
    biases and convolutions."""

    attention: AttentionSpec | RecurrentSpec
    mlp: MLPSpec | ExpertsSpec
    vectors: tuple[VectorSpec, ...] = ()

    @property
    def dense(self) -> tuple[LinearSpec, ...]:
        """The matrices that every token passes."""
        mlp = self.mlp.linears if isinstance(self.mlp, MLPSpec) else self.mlp.always_read
        return self.attention.linears + mlp

    @property
    def experts(self) -> ExpertsSpec | None:
        return self.mlp if isinstance(self.mlp, ExpertsSpec) else None

    @property
    def matrices(self) -> tuple[tuple[LinearSpec, int], ...]:
        """Every matrix of the layer with how often it is there: a dense one once, an expert's for every expert."""
        experts = self.experts
        routed = () if experts is None else experts.expert.linears
        number = 0 if experts is None else experts.num_experts
        return (*((linear, 1) for linear in self.dense), *((linear, number) for linear in routed))

    @property
    def num_inactive_parameters(self) -> int:
        """Parameters that one token does not pass: those of the experts that it is not sent to."""
        experts = self.experts
        if experts is None:
            return 0
        return (experts.num_experts - experts.num_active) * experts.expert.num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only model or an encoder: its layers and its ends. Sizes are in bytes where the name says so."""

    layers: tuple[LayerSpec, ...]
    embedding: LinearSpec
    """The table of token embeddings [vocab_size, hidden_size], or narrower if there are projections."""
    head: LinearSpec | None
    """The matrix that makes logits, as wide as the embedding; an encoder has none."""
    is_encoder: bool = False
    """Keys and values live for one layer, so all layers of one window share one place for them."""
    projections: tuple[LinearSpec, ...] = ()
    """Matrices from the width of the embedding to that of the layers, and back to that of the head."""
    tied: bool = False
    """The embedding's rows are read from the head: one matrix, held once, as the head holds it."""
    positions: LinearSpec | None = None
    """The table of learned positions."""
    vectors: tuple[VectorSpec, ...] = ()
    """The final norm, a bias of the head, and the vectors of an image encoder."""
    image_encoder: tuple[LinearSpec, ...] = ()
    """Matrices of an image encoder."""
    kept: KeptBits | None = None
    """None: no matrix keeps the bits of its checkpoint, but for those in MXFP4."""
    all_kvs: tuple[KVSpec, ...] = ()
    """In one stage of a model: what each layer of the whole leaves in the KV cache."""
    first_kv: int = 0
    """Index among them of the stage's first."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].attention.linears[-1].num_outputs

    @property
    def vocab_size(self) -> int:
        return (self.head or self.embedding).num_outputs

    @property
    def num_head_parameters(self) -> int:
        """Parameters of the matrix that makes logits."""
        return 0 if self.head is None else self.head.num_parameters

    @property
    def tables(self) -> tuple[LinearSpec, ...]:
        """Tables that only give rows; no quantisation touches them."""
        return tuple(each for each in (None if self.tied else self.embedding, self.positions) if each is not None)

    @property
    def expert_layers(self) -> tuple[tuple[ExpertsSpec, int], ...]:
        """Every kind of experts with the number of layers that have it."""
        return tuple(Counter(layer.experts for layer in self.layers if layer.experts is not None).items())

    @property
    def layer_parameters(self) -> int:
        """Parameters of all matrices of the layers, every expert's included."""
        return sum(count * linear.num_parameters for layer in self.layers for linear, count in layer.matrices)

    @property
    def active_layer_parameters(self) -> int:
        """Parameters of the layers that one token uses: of each mixture only the active experts."""
        return self.layer_parameters - sum(layer.num_inactive_parameters for layer in self.layers)

    @property
    def num_matrix_parameters(self) -> int:
        """Parameters of all matrices and tables, a tied one counted once."""
        outside = sum(matrix.num_parameters for matrix in (*self.tables, *self.projections, *self.image_encoder))
        return self.layer_parameters + self.num_head_parameters + outside

    @property
    def num_vector_parameters(self) -> int:
        """Parameters of norms and biases."""
        return sum(each.size for part in (self.vectors, *(layer.vectors for layer in self.layers)) for each in part)

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters, as a model card counts them."""
        return self.num_matrix_parameters + self.num_vector_parameters

    @property
    def num_active_parameters(self) -> int:
        """Parameters without the experts that a token is not sent to, as a model card counts "active" ones."""
        return self.num_parameters - sum(layer.num_inactive_parameters for layer in self.layers)

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest matrix that is packed as one."""
        inside = (linear.num_parameters for layer in self.layers for linear, _ in layer.matrices)
        return max(self.num_head_parameters, *inside)

    @property
    def largest_kv(self) -> int:
        """Elements that a token leaves in the cache of the layer that keeps most."""
        return max((kv.num_elements for kv in self.kvs), default=0)

    @property
    def kvs(self) -> list[KVSpec]:
        """One for every layer that has a part of the KV cache; in an encoder one for all layers of a window."""
        found = [layer.attention.kv for layer in self.layers if layer.attention.kv is not None]
        return list(dict.fromkeys(found)) if self.is_encoder else found

    @property
    def recurrent_layers(self) -> tuple[RecurrentSpec, ...]:
        """The layers that have a state in the place of a KV cache."""
        return tuple(layer.attention for layer in self.layers if isinstance(layer.attention, RecurrentSpec))

    @property
    def state_bytes(self) -> int:
        """Memory of one sequence's recurrent state in all layers; 0 for a model without recurrent layers."""
        return sum(layer.num_state_elements for layer in self.recurrent_layers) * FLOAT32_BYTES

    @property
    def elements_per_token(self) -> int:
        """Elements that the layers pass to each other for one token: two norms' outputs, attention's and the MLP's."""
        passed_on = sum(layer.attention.num_elements + layer.mlp.num_elements for layer in self.layers)
        return 2 * self.hidden_size * self.num_layers + passed_on

    @property
    def operations_per_pair(self) -> int:
        """Multiplications and additions of attention for one (query, key) pair, in all layers."""
        return sum(layer.attention.operations_per_pair for layer in self.layers)

    def layer_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Memory of the layers' matrices, every expert's included, with what a quantisation may add to some."""
        weight_format = METHODS[quantization].layers if quantization is not None else None
        matrices = (matrix for layer in self.layers for matrix in layer.matrices)
        total = sum(count * linear.weight_bytes(dtype, weight_format) for linear, count in matrices)
        if quantization is not None:
            return total + METHODS[quantization].extra_bytes(0 if self.expert_layers else self.layer_parameters)
        return total if self.kept is None else self.kept.in_place_of(total, DTYPE_BYTES[dtype])

    def head_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Memory of the matrix that makes logits; a quantisation has its own format for it."""
        kept = 0 if self.kept is None or quantization else self.kept.head_bytes
        if self.head is None or kept:
            return kept
        return self.head.weight_bytes(dtype, METHODS[quantization].head if quantization is not None else None)

    def packed_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Memory of what is packed: the layers' matrices, the head, projections and an encoder."""
        weight_format = METHODS[quantization].layers if quantization is not None else None
        projections = sum(each.weight_bytes(dtype, weight_format) for each in (*self.projections, *self.image_encoder))
        return self.layer_bytes(dtype, quantization) + self.head_bytes(dtype, quantization) + projections

    def matrix_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Memory of all matrices and tables; a quantisation leaves tables that only give rows in `dtype`."""
        return self.packed_bytes(dtype, quantization) + sum(table.weight_bytes(dtype) for table in self.tables)

    def weight_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Memory of all weights: matrices, tables, norms and biases."""
        return self.matrix_bytes(dtype, quantization) + self.num_vector_parameters * FLOAT32_BYTES

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Memory of one token's keys and values in all layers."""
        return sum(kv.bytes_per_token(dtype) for kv in self.kvs)

    def activation_bytes(self, num_tokens: int, num_logits: int) -> int:
        """Peak memory, in float32, of a step that computes `num_tokens` and samples from `num_logits` rows of logits.

        The peak of a layer holds the residual stream, its norm, the update, and what attention or the MLP passes on.
        """
        widest = max(max(layer.attention.num_elements, layer.mlp.num_elements) for layer in self.layers)
        token = 3 * self.hidden_size + widest
        # Sampling works on a second copy of the logits.
        logits = 0 if self.head is None else 2 * self.vocab_size + self.hidden_size
        return (num_tokens * token + num_logits * logits) * FLOAT32_BYTES


def _passed_on(linears: Sequence[LinearSpec]) -> int:
    """Elements between the first and the last of several dense layers: all outputs but the last, and its input."""
    return sum(linear.num_outputs for linear in linears[:-1]) + linears[-1].num_inputs
