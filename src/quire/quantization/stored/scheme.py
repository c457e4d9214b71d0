"""Scheme: how one dense layer is stored in few bits; StoredWeights: which layers of a checkpoint have which scheme;
KeptBits: the memory that follows."""

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a checkpoint stores a dense layer [num_outputs, num_inputs]."""

    layout: str
    """How its tensors lie: a row of LAYOUTS in `quire.models.stored`."""
    bits: int
    """Bits of one number in the checkpoint."""
    group_size: int | None = None
    """Inputs that share a scale; None: all."""
    symmetric: bool = False
    """Groups have a scale alone, no zero point of their own."""
    block: tuple[int, int] | None = None
    """Outputs and inputs of the tiles that share a scale, where scales belong to tiles."""

    def group_of(self, num_inputs: int) -> int:
        """Inputs that share a scale in a layer of `num_inputs`."""
        return self.group_size or num_inputs


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers whose name matches a pattern have a scheme; None: they are stored in floats."""

    pattern: str
    """A regular expression of whole names."""
    scheme: Scheme | None

    def matches(self, layer: str) -> bool:
        return _compiled(self.pattern).fullmatch(layer) is not None


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """How a checkpoint stores its dense layers: the first rule that matches a layer's name holds."""

    method: str
    """The format's name, for messages."""
    rules: tuple[Rule, ...]

    def scheme_of(self, layer: str) -> Scheme | None:
        """The scheme of the layer of this name; None: floats."""
        return next((rule.scheme for rule in self.rules if rule.matches(layer)), None)

    @property
    def usual(self) -> Scheme:
        """The scheme of most layers: that of the last rule that has one."""
        return next(rule.scheme for rule in reversed(self.rules) if rule.scheme is not None)

    def describe(self) -> str:
        """The format and its bits, for messages and plans."""
        widths = sorted({rule.scheme.bits for rule in self.rules if rule.scheme is not None})
        return f"{self.method}, {' and '.join(map(str, widths))} bits"


@dataclass(frozen=True, slots=True)
class KeptBits:
    """Matrices that keep the few bits of their checkpoint, whatever the others are stored as."""

    layer_parameters: int
    """Parameters of such matrices in the layers."""
    layer_bytes: int
    """Their memory, scales included."""
    head_bytes: int = 0
    """Memory of the head if it is such a matrix, else 0."""

    def in_place_of(self, total: int, parameter_bytes: int) -> int:
        """Bytes of all layers' matrices; `total` counts these in floats of `parameter_bytes`."""
        return total - self.layer_parameters * parameter_bytes + self.layer_bytes


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
