"""Adapters of a model's layers: what they hold for every slot of adapters, and what they add for a step's rows.

A layer that adapters can change is an `AdaptedLinear`. It computes what `Linear` computes, by the same calls. Where
rows of the step use an adapter that changes the layer, it then adds their updates, for all adapters at once. So rows
without an adapter have the same bits in every batch, and a step without adapters makes no call more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.kernels.interface import Packing
from quire.kernels.lora import LoraRows, LoraWeights
from quire.layers.activation import FUSED_ACTIVATIONS, FUSED_GATES, activation_function
from quire.layers.embedding import TokenEmbedding
from quire.layers.linear import Linear, LinearOrigin, LinearWeight
from quire.layers.norm import Normed
from quire.quantization import WeightFormat


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which rows of what a layer computes use which adapter."""

    by_count: Mapping[int, LoraRows]
    """Number of rows that a layer computes → those with an adapter. Inner layers compute all tokens of a step, the last
    one and the head fewer."""
    slots: int
    """A bit for each slot in use."""


@dataclass(slots=True)
class ModelAdapters:
    """The layers of one model that adapters can change, and the step they compute."""

    num_slots: int
    max_rank: int
    linears: "list[AdaptedLinear]" = field(default_factory=list)
    embedding_name: str = ""
    head_name: str = ""
    embedding: "AdaptedEmbedding | None" = None
    head: "AdaptedLinear | None" = None
    step: StepRows | None = None
    """Set by the runner, before the model and before the head; None: no row uses an adapter."""

    def clear(self, slot: int) -> None:
        """Empty a slot. No step may use it."""
        for linear in self.linears:
            linear.clear(slot)
        if self.embedding is not None:
            self.embedding.updates.pop(slot, None)

    @property
    def num_bytes(self) -> int:
        """Memory that adapters hold: that of all slots of the layers changed so far, and whole weights."""
        total = 0
        for linear in self.linears:
            if linear.lora is not None:
                total += linear.lora.a.nbytes + linear.lora.b.nbytes
            total += sum(_packed_bytes(whole) for whole in linear.whole.values())
        updates = () if self.embedding is None else tuple(self.embedding.updates.values())
        return total + sum(tensor.nbytes for update in updates for tensor in update.tensors)


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """A low-rank update of one part of a layer."""

    a: Tensor
    """[rank, K]"""
    b: Tensor
    """[N of the part, rank], the factor multiplied in."""
    magnitude: Tensor | None = None
    """[N of the part] of DoRA: the lengths of the changed weight's rows."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a layer's outputs that came from one stored layer."""

    origin: LinearOrigin | None
    first: int
    last: int
    """Columns `first` to `last` - 1."""

    def select(self, rows: Tensor) -> Tensor:
        """What belongs to the outputs of the stored layer -> the same of the part's, in their order."""
        assert self.origin is not None
        return rows if self.origin.rows is None else rows[self.origin.rows.to(rows.device)]


class AdaptedLinear(Linear):
    """A dense layer with updates of its own for each slot of adapters."""

    __slots__ = ("adapters", "lora", "magnitudes", "parts", "touched", "whole")

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[LinearWeight],
        dtype: str | WeightFormat,
        packing: Packing | None,
        adapters: ModelAdapters,
    ) -> None:
        super().__init__(kernels, weights, dtype, packing)
        parts, first = [], 0
        for weight in weights:
            last = first + weight.weight.shape[0]
            parts.append(Part(weight.origin, first, last))
            first = last
        self.adapters = adapters
        self.parts = tuple(parts)
        self.lora: LoraWeights | None = None
        """Made when the first adapter changes the layer."""
        self.touched = 0
        """A bit for each slot whose adapter changes the layer."""
        self.magnitudes: dict[int, Tensor] = {}
        """Slot → [N]: what DoRA multiplies the outputs by."""
        self.whole: dict[int, Linear] = {}
        """Slot → the layer that stands in for this one."""
        adapters.linears.append(self)

    def __call__(self, x: Tensor | Normed) -> Tensor:
        out = super().__call__(x)
        rows = self._rows(out)
        if rows is not None:
            # The base layer has added the update to the residual stream.
            inputs = x.norm(rows.select(x.residual)) if isinstance(x, Normed) else rows.select(x)
            self._add(out, inputs, rows)
        return out

    # What the kernels do not fuse with a layer is computed before the layer is called.

    def after_activation(self, x: Tensor, activation: str) -> Tensor:
        out = super().after_activation(x, activation)
        rows = self._rows(out) if activation in FUSED_ACTIVATIONS else None
        if rows is not None:
            self._add(out, activation_function(activation)(rows.select(x)), rows)
        return out

    def after_gate(self, x: Tensor, activation: str) -> Tensor:
        out = super().after_gate(x, activation)
        rows = self._rows(out) if activation in FUSED_GATES else None
        if rows is not None:
            gate, up = rows.select(x).chunk(2, dim=1)
            self._add(out, activation_function(activation)(gate) * up, rows)
        return out

    def _rows(self, out: Tensor) -> LoraRows | None:
        """The step's rows of `out` [T, N] with adapters, if one of its adapters changes the layer."""
        step = self.adapters.step
        if step is None or not step.slots & self.touched:
            return None
        rows = step.by_count[len(out)]
        return rows if rows.groups else None

    def _add(self, out: Tensor, inputs: Tensor, rows: LoraRows) -> None:
        """Change the rows of `out` [T, N]; `inputs` [M, K] are those of the rows."""
        if self.magnitudes or self.whole:
            for slot, begin, end in rows.groups:
                places = rows.rows[begin:end]
                if slot in self.whole:
                    out[places] = self.whole[slot](inputs[begin:end])
                elif slot in self.magnitudes:
                    bias = 0.0 if self.bias is None else self.bias
                    out[places] = ((out[places] - bias) * self.magnitudes[slot] + bias).to(out.dtype)
        if self.lora is not None:
            self.kernels.add_lora(out, inputs.contiguous(), rows, self.lora)

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, slot: int, updates: Sequence[LoraUpdate | None], dtype: torch.dtype, device: torch.device) -> None:
        """Put an adapter's updates, one entry for each part, into a slot that no step uses."""
        lora = self.lora or self._allocate(dtype, device)
        magnitudes = torch.ones(self.num_outputs)
        for index, (part, update) in enumerate(zip(self.parts, updates, strict=True)):
            lora.ranks[slot, index] = 0
            if update is None:
                continue
            rank = len(update.a)
            b = part.select(update.b)
            if update.magnitude is not None:
                factors = part.select(update.magnitude) / self._lengths(part, update.a, b)
                magnitudes[part.first : part.last] = factors
                b = b * factors[:, None]
            lora.a[slot, index, :rank] = update.a
            lora.b[slot, :rank, part.first : part.last] = b.t()
            lora.ranks[slot, index] = rank
        if any(update is not None and update.magnitude is not None for update in updates):
            self.magnitudes[slot] = magnitudes.to(device)
        self.lora = lora
        self.touched |= 1 << slot

    def replace(self, slot: int, whole: Linear) -> None:
        """Let `whole` compute the rows of a slot's adapter."""
        self.whole[slot] = whole
        self.touched |= 1 << slot

    def clear(self, slot: int) -> None:
        self.touched &= ~(1 << slot)
        self.magnitudes.pop(slot, None)
        self.whole.pop(slot, None)
        if self.lora is not None:
            self.lora.ranks[slot] = 0

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> LoraWeights:
        num_slots, max_rank, num_parts = self.adapters.num_slots, self.adapters.max_rank, len(self.parts)
        return LoraWeights(
            torch.zeros(num_slots, num_parts, max_rank, self.num_inputs, dtype=dtype, device=device),
            torch.zeros(num_slots, max_rank, self.num_outputs, dtype=dtype, device=device),
            torch.zeros(num_slots, num_parts, dtype=torch.int32, device=device),
            torch.tensor([part.last for part in self.parts], dtype=torch.int32, device=device),
        )

    def _lengths(self, part: Part, a: Tensor, b: Tensor) -> Tensor:
        """[N of the part]: the lengths of the rows of the changed weight."""
        changed = self.unpacked()[part.first : part.last].cpu() + b @ a
        lengths: Tensor = torch.linalg.vector_norm(changed, dim=1)
        return lengths


@dataclass(frozen=True, slots=True)
class EmbeddingUpdate:
    """An adapter's change of the token embeddings: a low-rank one, or a whole table."""

    tensors: tuple[Tensor, ...]
    """A [vocab_size, rank] and B [rank, H], the factor multiplied in; or the table [vocab_size, H]."""


class AdaptedEmbedding:
    """Token embeddings with updates for some slots of adapters."""

    __slots__ = ("adapters", "inner", "updates")

    def __init__(self, inner: TokenEmbedding, adapters: ModelAdapters) -> None:
        self.inner = inner
        self.adapters = adapters
        self.updates: dict[int, EmbeddingUpdate] = {}
        adapters.embedding = self

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H], a fresh tensor."""
        out = self.inner(ids)
        step = self.adapters.step
        if step is not None and self.updates:
            rows = step.by_count[len(out)]
            for slot, begin, end in rows.groups:
                if slot in self.updates:
                    _change(out, ids, rows.rows[begin:end], self.updates[slot])
        return out


def _change(out: Tensor, ids: Tensor, places: Tensor, update: EmbeddingUpdate) -> None:
    found = update.tensors[0].index_select(0, ids[places])
    if len(update.tensors) == 1:
        out[places] = found.to(out.dtype)
    else:
        out[places] += (found @ update.tensors[1]).to(out.dtype)


def _packed_bytes(linear: Linear) -> int:
    return linear.packed.nbytes
