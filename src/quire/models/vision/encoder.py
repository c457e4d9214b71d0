"""ImageEncoder: what a model that reads images offers beside its decoder."""

from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor

from quire.model_config import ImageProcessing
from quire.models.weights import WeightScope

Layers = Generator[None, None, Tensor]
"""A computation that pauses after each layer, so that an image can be encoded in several steps."""


class ImageEncoder(Protocol):
    """Computes the embeddings that take the place of an image's placeholder tokens."""

    num_layers: int

    def encode(self, tiles: Tensor, original_size: tuple[int, int]) -> Layers:
        """tiles uint8 [num_tiles, height, width, 3] of one image, whose (height, width) was `original_size` -> [number
        of its tokens, H], with a pause after each of `num_layers`."""
        ...


class Encoding:
    """An image that is being encoded."""

    def __init__(self, encoder: ImageEncoder, tiles: Tensor, original_size: tuple[int, int]) -> None:
        self._layers = encoder.encode(tiles, original_size)
        self._num_layers = encoder.num_layers
        self._num_done = 0

    def advance(self, end: int, total: int) -> Tensor | None:
        """Go on until `end` of `total` is done; returns the embeddings when all is."""
        try:
            while end == total or self._num_done < self._num_layers * end // total:
                next(self._layers)
                self._num_done += 1
        except StopIteration as finished:
            embeddings: Tensor = finished.value
            return embeddings
        return None


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
