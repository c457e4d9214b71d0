"""ImageEncoder: what a model that reads images offers beside its decoder."""

from typing import Protocol

import torch
from torch import Tensor

from quire.model_config import ImageProcessing
from quire.models.weights import WeightScope


class ImageEncoder(Protocol):
    """Computes the embeddings that take the place of an image's placeholder tokens."""

    def __call__(self, tiles: Tensor, original_size: tuple[int, int]) -> Tensor:
        """tiles uint8 [num_tiles, height, width, 3] of one image, whose (height, width) was `original_size` -> [number
        of its tokens, H]."""
        ...


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
