"""The tensors of a GGUF model under the names that its family's checkpoints have on the Hugging Face hub."""

from collections.abc import Iterator
from dataclasses import dataclass

from quire.errors import CheckpointError
from quire.gguf.families import FAMILIES, WHOLE, Family
from quire.gguf.file import GgufFile
from quire.gguf.header import GgufTensor

_BLOCK = "blk."
_SOFTMAX, _SIGMOID = 1, 2
"""How a router's scores are made, by llama.cpp's number."""
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the config."""
_UNREAD = ("attn_rot_embd", "nextn.")
"""Tensors of a layer that llama.cpp does not read either."""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor, or one matrix of a stack of them, as a model asks for it."""

    stored_as: str
    """Its name in the file."""
    tensor: GgufTensor
    part: str
    """What it is in its layer, in GGUF's words: "attn_q"; for a tensor outside the layers its name."""
    index: int | None = None
    """Which matrix of a stack it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.index is None else self.tensor.shape[1:]


def family_of(file: GgufFile) -> Family:
    """Raises `CheckpointError` for an architecture that has no row."""
    return FAMILIES[family_key(file)]


def family_key(file: GgufFile) -> str:
    """The key of a file's row in FAMILIES. Raises `CheckpointError` for an architecture that has none."""
    name = file.architecture
    if name == "llama" and file.integer("llama.expert_count", 0, minimum=0):
        name = "llama with experts"
    if name == "falcon" and f"{_BLOCK}0.attn_norm_2.weight" in file.tensors:
        name = "falcon with two norms"
    if name == "deepseek2" and file.integer("deepseek2.expert_gating_func", _SOFTMAX) == _SIGMOID:
        name = "deepseek2 with sigmoids"
    if name not in FAMILIES:
        known = ", ".join(each for each in FAMILIES if " " not in each)
        raise CheckpointError(f"{file.path}: general.architecture is {name[:100]}; supported: {known}")
    return name


def named_tensors(file: GgufFile) -> dict[str, NamedTensor]:
    """Every tensor by its original name. One that the family does not know keeps its own name, so that it is found to
    be left over."""
    family = family_of(file)
    return dict(pair for name in file.tensors if name not in FACTORS for pair in _named(file, family, name))


def _named(file: GgufFile, family: Family, name: str) -> Iterator[tuple[str, NamedTensor]]:
    tensor = file.tensors[name]
    stem, _, ending = name.rpartition(".")
    prefix, part, names = "", stem, family.ends
    if name.startswith(_BLOCK):
        layer, _, part = stem.removeprefix(_BLOCK).partition(".")
        part = part or ending  # "blk.0.ssm_a" has no ending
        prefix, names = family.layer.format(layer), family.parts
        if part.startswith(_UNREAD):
            return
    original = names.get(part)
    if original is None:
        yield name, NamedTensor(name, tensor, part)
    elif original.startswith(WHOLE):
        yield prefix + original.removeprefix(WHOLE), NamedTensor(name, tensor, part)
    elif "{" not in original:
        yield f"{prefix}{original}.{ending}", NamedTensor(name, tensor, part)
    else:
        for index in range(tensor.shape[0]):
            full = f"{prefix}{original.format(expert=index, head=index)}.{ending}"
            yield full, NamedTensor(name, tensor, part, index)
