"""The image encoder of Idefics3 and SmolVLM: a tower of SigLIP, whose patches are merged in squares and projected."""

from torch import Tensor

from quire.model_config import VisionConfig
from quire.models.builder import Builder
from quire.models.vision.encoder import Normaliser, Pieces, by_rows
from quire.models.vision.tower import Tower, num_products, vision_linear


class Idefics3Encoder:
    """Satisfies `ImageEncoder`."""

    def __init__(self, build: Builder, vision: VisionConfig) -> None:
        self.normalise = Normaliser(vision.processing, build.weights)
        self.tower = Tower(build.scope("model.vision_model"), vision, has_class=False)
        self.merge, self.side = vision.merge, vision.patches_per_side // vision.merge
        projector = build.scope("model.connector.modality_projection")
        num_merged = vision.hidden_size * vision.merge**2
        self.projector = vision_linear(projector, {"proj": vision.projector_width}, num_merged, bias=False)

    def encode(self, tiles: Tensor, original_size: tuple[int, int]) -> Pieces:
        features = yield from self.tower.encode(self.normalise(tiles))
        merge, side = self.merge, self.side
        squares = features.view(len(tiles), side, merge, side, merge, -1).permute(0, 1, 3, 2, 4, 5)
        return (
            yield from by_rows(
                self.projector, squares.reshape(len(tiles) * side * side, -1), num_products(self.projector)
            )
        )

    def work(self, tiles: Tensor) -> int:
        num_patches = len(tiles) * (self.side * self.merge) ** 2
        return self.tower.work(len(tiles)) + num_patches // self.merge**2 * num_products(self.projector)
