"""Stage: consecutive layers of a model, where several ranks hold its layers one after the other (pipeline parallelism).

The first stage has the embedding, the last one the final norm and the output head; a tied table is on both. No torch.
"""

from dataclasses import dataclass, replace

from quire.layer_spec import KVSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Stage:
    """One of `size` stages."""

    index: int
    size: int
    first_layer: int
    num_layers: int
    """Layers of this stage."""
    num_all_layers: int
    """Layers of the whole model."""
    kvs: tuple[KVSpec, ...]
    """What a token leaves in the KV cache of each layer of the whole model."""
    first_kv: int
    """Index among them of this stage's first one."""

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    @property
    def layers(self) -> range:
        """Indices of this stage's layers in the whole model."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    def own_part(self, spec: ModelSpec) -> ModelSpec:
        """What this stage has of a model whose `layers` are its own already, but whose ends are those of the whole."""
        has_table = self.is_first or (self.is_last and spec.tied)
        has_head = self.is_last or (self.is_first and spec.tied)
        first, last = spec.projections[:1], spec.projections[1:]
        return replace(
            spec,
            embedding=spec.embedding if has_table else replace(spec.embedding, num_outputs=0),
            head=spec.head if has_head else None,
            positions=spec.positions if self.is_first else None,
            projections=(*(first if self.is_first else ()), *(last if self.is_last else ())),
            vectors=tuple(
                vector
                for vector in spec.vectors
                if (self.is_first if vector.name.startswith("embedding_norm.") else self.is_last)
            ),
            all_kvs=self.kvs,
            first_kv=self.first_kv,
        )

    def others_tensors(self) -> tuple[str, ...]:
        """Patterns of the names of tensors that other stages take: of their layers, and of the model's two ends. The
        first number in a name is its layer."""
        no_number = r"^(?:[^.]*[^.\d][^.]*\.)*"
        if self.is_last:
            others = "|".join(map(str, range(self.first_layer)))
            layers = rf"(?:{others})\."
        else:  # further layers than the model has are the last stage's to judge
            own = "|".join(map(str, self.layers))
            layers = rf"(?!(?:{own})\.)\d+\."
        return (no_number + layers, rf"{no_number}[^.]*[^.\d][^.]*$")
