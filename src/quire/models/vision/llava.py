"""LLaVA's image encoder: a tower of CLIP, and a projector of two layers.

LLaVA 1.6 encodes the whole image and the tiles of a grid, puts the features of the tiles together, cuts off those of
the padding, and ends every row with one learned embedding.
"""

import torch
from torch import Tensor

from quire.images.grid import best_grid, unpadded
from quire.layers.activation import activation_function
from quire.model_config import VisionConfig
from quire.models.builder import Builder
from quire.models.vision.encoder import Normaliser, Pieces, by_rows
from quire.models.vision.names import find_scope
from quire.models.vision.tower import Tower, num_products, vision_linear


class LlavaEncoder:
    """Satisfies `ImageEncoder`."""

    def __init__(self, build: Builder, vision: VisionConfig) -> None:
        weights = build.weights
        tower_names = ("vision_tower.vision_model", "vision_tower", "model.vision_tower")
        tower = find_scope(build, tower_names, "embeddings.class_embedding")
        projector = find_scope(build, ("multi_modal_projector", "model.multi_modal_projector"), "linear_1.weight")
        self.vision = vision
        self.normalise = Normaliser(vision.processing, weights)
        self.tower = Tower(tower, vision, has_class=True)
        num_features = vision.hidden_size * len(vision.feature_layers)
        width, bias = vision.projector_width, vision.projector_bias
        self.linear_1 = vision_linear(projector, {"linear_1": width}, num_features, bias=bias)
        self.linear_2 = vision_linear(projector, {"linear_2": width}, width, bias=bias)
        self.activation = activation_function(vision.projector_activation)
        self.newline: Tensor | None = None
        if vision.family == "llava_next":
            name = "image_newline" if weights.has("image_newline") else "model.image_newline"
            self.newline = weights.take(name, (width,)).to(weights.activation_dtype)

    def encode(self, tiles: Tensor, original_size: tuple[int, int]) -> Pieces:
        features = yield from self.tower.encode(self.normalise(tiles))
        if not self.vision.keeps_class:
            features = features[:, 1:]
        rows = features.reshape(-1, features.shape[2])
        projected = yield from by_rows(self._project, rows, num_products(self.linear_1, self.linear_2))
        if self.newline is None:
            return projected
        return self._join(projected.view(*features.shape[:2], -1), original_size, self.newline)

    def work(self, tiles: Tensor) -> int:
        num_features = len(tiles) * (self.vision.patches_per_side**2 + self.vision.keeps_class)
        return self.tower.work(len(tiles)) + num_features * num_products(self.linear_1, self.linear_2)

    def _project(self, features: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(features)))

    def _join(self, features: Tensor, original_size: tuple[int, int], newline: Tensor) -> Tensor:
        """features [tiles, N, H], of the whole image first -> [number of tokens, H]."""
        side = self.vision.patches_per_side
        rows, columns = best_grid(original_size, self.vision.grid_pinpoints)
        rows, columns = rows // self.vision.image_size, columns // self.vision.image_size
        whole, grid = features[0], features[1:].view(rows, columns, side, side, -1)
        joined = grid.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, -1)
        top, left = unpadded(original_size, (joined.shape[0], joined.shape[1]))
        joined = joined[top : joined.shape[0] - top, left : joined.shape[1] - left]
        lines = torch.cat((joined, newline.expand(joined.shape[0], 1, -1)), dim=1)
        return torch.cat((whole, lines.flatten(0, 1)))
