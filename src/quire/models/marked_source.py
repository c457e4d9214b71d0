"""MarkedSource: a `TensorSource` over another that hands out stand-ins of matrices (`row_marks`)."""

import re
from dataclasses import replace

import torch
from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.model_config import ModelConfig
from quire.models.row_marks import RowMarks
from quire.models.source_around import SourceAround
from quire.models.stand_in_packing import StandInPacking
from quire.models.weights import TensorSource

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")


class MarkedSource(SourceAround, StandInPacking):
    """Knows the matrices for which it gave stand-ins. A subclass says what is made of those that come back."""

    def __init__(self, config: ModelConfig, source: TensorSource) -> None:
        super().__init__(source)
        self._config = config
        self.marks = RowMarks()
        self.matrices: dict[str, LinearWeight] = {}
        """Layer → what the source has."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._source.take(name, shape)
        if not self._is_tied_head(name, shape):
            return tensor
        # A tied model compares its head with its embedding, which is the matrix of this shape that it took first.
        layer = name.removesuffix(".weight")
        table = next((each for each, stored in self.matrices.items() if tuple(stored.weight.shape) == shape), layer)
        if table != layer and torch.equal(tensor.float(), self.matrices[table].floats().float()):
            layer = table
        return self.marks.of(layer, (shape[0], shape[1]))

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        stored = self._source.take_linear(name, shape, bias=bias, transposed=transposed)
        self.matrices[name] = stored
        return replace(stored, weight=self.marks.of(name, shape))

    def _is_tied_head(self, name: str, shape: tuple[int, ...]) -> bool:
        is_head = _HEAD.search(name) is not None and len(shape) == 2 and shape[0] == self._config.vocab_size
        return is_head and self._config.tie_word_embeddings
