"""GgufNames: the tensors of a checkpoint under the names and in the stacks that llama.cpp's family gives them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from quire.errors import CheckpointError
from quire.gguf.families import FAMILIES, WHOLE, Family
from quire.model_config import ModelConfig
from quire.model_config.folder_kinds import name_some

_WHOLE_ENDS = {"exp_probs_b": "bias", "attn_sinks": "weight"}
"""The endings of tensors whose originals have none."""

_WRITTEN_AS = {"MistralForCausalLM": "LlamaForCausalLM", "InternLM3ForCausalLM": "LlamaForCausalLM"}
"""Architectures that llama.cpp computes as another: without windows they are the same."""


class Place(NamedTuple):
    """Where a tensor goes."""

    name: str
    part: str
    slot: int | None = None
    """Which matrix of a stack it becomes."""


@dataclass(frozen=True, slots=True)
class GgufNames:
    """A family, and the place of each tensor."""

    key: str
    """The row of FAMILIES."""
    family: Family
    places: Mapping[str, Place]

    @property
    def architecture(self) -> str:
        """What the file says; the word after it in the key of a row is Quire's own."""
        return self.key.partition(" ")[0]

    @classmethod
    def of(cls, config: ModelConfig, names: Iterable[str], key: str | None = None) -> "GgufNames":
        """The names of a model's tensors. Raises `CheckpointError` where no family has places for all of them."""
        names = list(names)
        architecture = _WRITTEN_AS.get(config.architecture, config.architecture)
        rows = {name: row for name, row in FAMILIES.items() if row.architecture == architecture and key in (None, name)}
        rows = {name: row for name, row in rows.items() if row.is_written}
        left: list[str] = []
        for name, row in rows.items():
            places = _places(row, config)
            left = sorted(each for each in names if each not in places)
            if not left:
                return cls(name, row, {each: places[each] for each in names})
        if not rows:
            known = ", ".join(dict.fromkeys(row.architecture for row in FAMILIES.values() if row.is_written))
            raise CheckpointError(f"{config.architecture} cannot be written as GGUF; supported: {known}")
        raise CheckpointError(
            f"{len(left)} tensors of this {config.architecture} have no place in GGUF: {name_some(left)}"
        )


def _places(family: Family, config: ModelConfig) -> dict[str, Place]:
    """Original name → place, for every tensor that the family may have. Where two parts have one original name, the
    later is the one that llama.cpp writes."""
    places = {}
    counts = {"{expert}": config.num_experts, "{head}": max(config.num_heads, config.num_kv_heads)}
    for end in ("weight", "bias"):
        for part, original in family.ends.items():
            places[f"{original}.{end}"] = Place(f"{part}.{end}", part)
    for layer in range(config.num_layers):
        prefix = family.layer.format(layer)
        for part, original in family.parts.items():
            for end in ("weight", "bias"):
                name = f"blk.{layer}.{part}.{end}"
                kind = next((each for each in counts if each in original), None)
                if original.startswith(WHOLE):
                    if end == _WHOLE_ENDS[part]:
                        places[prefix + original.removeprefix(WHOLE)] = Place(name, part)
                    continue
                if kind is None:
                    places[f"{prefix}{original}.{end}"] = Place(name, part)
                    continue
                for index in range(counts[kind]):
                    places[f"{prefix}{original.replace(kind, str(index))}.{end}"] = Place(name, part, index)
    return places
