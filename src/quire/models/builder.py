"""Builder: makes a model's layers from its config and its weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quire.dtypes import FLOAT32_BYTES
from quire.kernels import Kernels
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.coded import CodedMatrix
from quire.layers.adapters import AdaptedEmbedding, AdaptedLinear
from quire.layers.embedding import DividedEmbedding, Embedding, PackedEmbedding, TiedEmbedding, TokenEmbedding
from quire.layers.experts import ExpertLinear, ExpertMLPs
from quire.layers.linear import (
    DividedHead,
    Linear,
    LinearOrigin,
    LinearWeight,
    Table,
    can_join_layers,
    dense_layer,
    head_format,
    output_head,
)
from quire.layers.norm import LayerNorm, NoNorm, Norm, RMSNorm
from quire.model_config import ModelConfig
from quire.models.safetensors_file import RELEASED_BYTES
from quire.models.shards import Division, Part
from quire.models.weights import WeightScope
from quire.quantization import METHODS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Builder:
    """What every part of a model is made from. Names are relative to the scope of the weights."""

    config: ModelConfig
    weights: WeightScope
    kernels: Kernels
    dtype: str
    """How dense layers are packed: a float type, or the name of a quantisation."""

    def scope(self, name: str) -> "Builder":
        """A builder for the tensors below `name`."""
        return replace(self, weights=self.weights.scope(name))

    @property
    def float_dtype(self) -> str:
        """The type of layers that are never quantised."""
        if self.dtype not in METHODS:
            return self.dtype
        return str(self.weights.activation_dtype).removeprefix("torch.")

    def linear(
        self,
        rows: Mapping[str, int],
        num_inputs: int,
        *,
        bias: bool = False,
        transposed: bool = False,
        split: Division | Sequence[Part] | None = None,
    ) -> Linear:
        """One layer from several stored ones, outputs side by side; `rows` maps their names to their output sizes.
        `split`: how ranks divide each of them."""
        take = partial(self.weights.take_linear, bias=bias, transposed=transposed, split=split)
        return self.pack(*(take(name, (count, num_inputs)) for name, count in rows.items()))

    def pack(self, *weights: LinearWeight, quantizes: bool = True) -> Linear:
        """One layer of stored ones, outputs side by side. `quantizes=False` keeps it in floats whatever the dtype."""
        if not quantizes:
            weights = tuple(weight.in_floats() for weight in weights)
        dtype, packing, adapters = (
            self.dtype if quantizes else self.float_dtype,
            self.weights.packing,
            self.weights.adapters,
        )
        if adapters is None or all(weight.origin is None for weight in weights):
            return dense_layer(self.kernels, weights, dtype, packing)
        if not can_join_layers(weights):
            weights = tuple(weight.in_floats() for weight in weights)
        return AdaptedLinear(self.kernels, weights, dtype, packing, adapters)

    def pack_experts(self, gate_up: ExpertLinear, down: ExpertLinear, activation: str | None = None) -> ExpertMLPs:
        """The MLPs of a layer's experts, by default with the activation of the config."""
        config = self.config
        return ExpertMLPs(
            self.kernels,
            gate_up,
            down,
            config.expert_intermediate_size,
            activation or config.activation,
            self.dtype,
            self.weights.packing,
            None if self.weights.shards is None else self.weights.shards.ranks,
        )

    def norm(self, name: str) -> Norm:
        """A norm of the residual stream, of the kind that config says."""
        config, shape = self.config, (self.config.hidden_size,)
        weight = self.weights.take(f"{name}.weight", shape).float()
        if config.norm_unit_offset:
            weight = weight + 1
        bias = self.weights.take(f"{name}.bias", shape).float() if config.norm_bias else None
        if config.norm == "rms_norm":
            return RMSNorm(self.kernels, weight, config.norm_eps)
        # Where the kernels have no LayerNorm, torch's wants its weight in the type of its input.
        dtype = self.weights.activation_dtype
        return LayerNorm(self.kernels, weight.to(dtype), None if bias is None else bias.to(dtype), config.norm_eps)

    def final_norm(self, name: str) -> Norm:
        """The norm before the head, which the last stage has; what the others pass on is the residual stream."""
        return self.norm(name) if self.is_last_stage else NoNorm()

    @property
    def is_first_stage(self) -> bool:
        """Whether the model's first layer is here."""
        return self.config.stage is None or self.config.stage.is_first

    @property
    def is_last_stage(self) -> bool:
        """Whether the model's last layer is here."""
        return self.config.stage is None or self.config.stage.is_last

    def table(self, name: str, width: int, head: str = "lm_head") -> Table:
        """The token embeddings [vocab_size, width]. Of a tied model the checkpoint may hold the head alone. A stage
        that has neither embedding nor tied head gets no rows."""
        if not self.is_first_stage and not (self.is_last_stage and self.config.tie_word_embeddings):
            return torch.empty(0, width, device=getattr(self.weights.source, "device", "cpu"))
        shape = (self.config.vocab_size, width)
        if self.weights.adapters is not None:
            self.weights.adapters.embedding_name = self.weights.prefix + name
        is_headless = not self.weights.has(f"{name}.weight") and self.weights.has(f"{head}.weight")
        layer = self.weights.take_linear(head if self.config.tie_word_embeddings and is_headless else name, shape)
        layer = self._own_tokens(layer)
        return layer.floats() if isinstance(layer.weight, CodedMatrix) else layer.weight

    def ends(self, table: Table, head_name: str = "lm_head") -> tuple[TokenEmbedding | None, Linear | None]:
        """Embedding and output head: `table` [vocab_size, H] and, where they are not tied, the layer `head_name`. A
        tied head may still have a bias of its own.

        A checkpoint that ties them and yet holds a head with other values has an untied head, as in transformers. A
        stage has none of them, or one, and of a tied model both.
        """
        num_outputs, num_inputs = self.config.vocab_size, table.shape[1]
        has_bias = self.config.head_bias
        if not self.is_first_stage and not self.is_last_stage:
            return None, None
        if self.config.tie_word_embeddings and not self._holds_other_head(table, head_name):
            bias = self.weights.take(f"{head_name}.bias", (num_outputs,)) if has_bias else None
            if bias is not None and self.weights.shards is not None:
                bias = bias[self.weights.shards.vocabulary]
            tied = self._head(LinearWeight(table, bias), head_name)
            return self._adapted(TiedEmbedding(tied)), tied
        embedding: TokenEmbedding | None = None
        head: Linear | None = None
        if self.is_first_stage:
            embedding = self._adapted(self._embedding(table))
        if self.is_last_stage:
            stored = self.weights.take_linear(head_name, (num_outputs, num_inputs), bias=has_bias)
            head = self._head(self._own_tokens(stored), head_name)
        return embedding, head

    def _embedding(self, table: Table) -> TokenEmbedding:
        if isinstance(table, BlockMatrix):
            return PackedEmbedding(self.kernels, self.kernels.pack_blocks([table]), table.shape[1])
        return Embedding(table, self.weights.activation_dtype)

    def _own_tokens(self, whole: LinearWeight) -> LinearWeight:
        """This rank's rows of a table of the vocabulary."""
        return whole if self.weights.shards is None else self.weights.shards.of_vocabulary(whole)

    def _head(self, stored: LinearWeight, name: str) -> Linear:
        adapters, packing, shards = self.weights.adapters, self.weights.packing, self.weights.shards
        if adapters is None:
            head = output_head(self.kernels, stored, self.dtype, packing)
            return head if shards is None else DividedHead(head, shards.ranks, shards.padded_rows, shards.vocab_size)
        adapters.head_name = self.weights.prefix + name
        stored = replace(stored, origin=LinearOrigin(adapters.head_name, stored.weight.shape[0]))
        adapters.head = AdaptedLinear(self.kernels, [stored], head_format(self.dtype), packing, adapters)
        return adapters.head

    def _adapted(self, embedding: TokenEmbedding) -> TokenEmbedding:
        adapters, shards = self.weights.adapters, self.weights.shards
        if shards is not None:
            embedding = DividedEmbedding(embedding, shards.vocabulary, shards.ranks)
        return embedding if adapters is None else AdaptedEmbedding(embedding, adapters)

    def _holds_other_head(self, table: Table, head_name: str) -> bool:
        """Whether a head is stored whose values are not the table's."""
        name = f"{head_name}.weight"
        if not self.weights.has(name) or isinstance(table, BlockMatrix):
            return False
        whole = LinearWeight(self.weights.take(name, (self.config.vocab_size, table.shape[1])))
        stored = self._own_tokens(whole).floats()
        num_rows = max(1, RELEASED_BYTES // (table.shape[1] * FLOAT32_BYTES))
        pieces = (each.split(num_rows) for each in (stored, table))
        differs = not all(self._are_equal(rows, others) for rows, others in zip(*pieces, strict=True))
        if differs:
            logger.warning(
                "the checkpoint holds %s with other values than the embeddings, although tie_word_embeddings is true; "
                "it is used as the output head, which takes %d MB more than planned",
                self.weights.prefix + name,
                table.nbytes / 1e6,
            )
        return differs

    def _are_equal(self, rows: Tensor, others: Tensor) -> bool:
        """Whether rows of two tables are equal, whatever their types; their pages are given back."""
        equal = torch.equal(rows.float(), others.float())
        for each in (rows, others):
            self.weights.release(each)
        return equal

    def rounded(self, factor: float) -> float:
        """A factor as the checkpoint's dtype holds it, which is how transformers multiplies by it."""
        return torch.tensor(factor, dtype=getattr(torch, self.config.checkpoint_dtype)).item()
