"""ImageEncoder: what a model that reads images offers beside its decoder.

An image is encoded in pieces of some rows of one layer, so that a step can encode little beside decoding sequences.
"""

from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor

from quire.model_config import ImageProcessing
from quire.models.weights import WeightScope

Pieces = Generator[int, None, Tensor]
"""A computation that pauses after each piece and tells its work in multiplications."""

_ROWS_OF_A_PIECE = 16
"""On a CPU: few enough that a piece takes milliseconds, enough that a product runs at full speed."""


class ImageEncoder(Protocol):
    """Computes the embeddings that take the place of an image's placeholder tokens."""

    def encode(self, tiles: Tensor, original_size: tuple[int, int]) -> Pieces:
        """tiles uint8 [num_tiles, height, width, 3] of one image, whose (height, width) was `original_size` -> [number
        of its tokens, H], in pieces."""
        ...

    def work(self, tiles: Tensor) -> int:
        """About as many multiplications as all pieces of `encode` tell."""
        ...


class Encoding:
    """An image that is being encoded."""

    def __init__(self, encoder: ImageEncoder, tiles: Tensor, original_size: tuple[int, int]) -> None:
        self._pieces = encoder.encode(tiles, original_size)
        self._work = encoder.work(tiles)
        self._done = 0
        self._embeddings: Tensor | None = None

    def advance(self, end: float, total: int) -> Tensor | None:
        """Go on until `end` of `total` is done; returns the embeddings when all is."""
        while self._embeddings is None and (end == total or self._done * total < self._work * end):
            try:
                self._done += next(self._pieces)
            except StopIteration as finished:
                self._embeddings = finished.value
        return self._embeddings if end == total else None


def num_rows_of_a_piece(device: torch.device) -> int:
    """Rows that a piece computes. A device computes all at once: its steps have no other use for small products."""
    return _ROWS_OF_A_PIECE if device.type == "cpu" else 2**31 - 1


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, work: int) -> Pieces:
    """function(x) for a function of single rows [N, ...] -> [N, ...]; `work` is that of one row."""
    done = []
    for rows in x.split(min(len(x), num_rows_of_a_piece(x.device))):
        done.append(function(rows))
        yield len(rows) * work
    return torch.cat(done)


class Normaliser:
    """From 8-bit values to what a model was trained on: (value * factor - mean) / std, as transformers computes it."""

    def __init__(self, processing: ImageProcessing, weights: WeightScope) -> None:
        self.factor = processing.factor
        self.dtype = weights.activation_dtype
        self.mean = torch.tensor(processing.mean)
        self.std = torch.tensor(processing.std)

    def __call__(self, tiles: Tensor) -> Tensor:
        """uint8 [B, height, width, 3] -> [B, 3, height, width]."""
        mean, std = self.mean.to(tiles.device), self.std.to(tiles.device)
        return ((tiles.float() * self.factor - mean) / std).permute(0, 3, 1, 2).to(self.dtype)
