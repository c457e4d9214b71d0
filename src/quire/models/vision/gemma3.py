"""The image encoder of Gemma 3: a tower of SigLIP, whose patches are averaged in squares, normed and projected."""

from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.layers.norm import RMSNorm
from quire.model_config import VisionConfig
from quire.models.builder import Builder
from quire.models.vision.encoder import Normaliser, Pieces, by_rows
from quire.models.vision.names import find_scope
from quire.models.vision.tower import Tower, num_products


class Gemma3Encoder:
    """Satisfies `ImageEncoder`."""

    def __init__(self, build: Builder, vision: VisionConfig) -> None:
        tower_names = (
            "vision_tower.vision_model",
            "vision_tower",
            "model.vision_tower.vision_model",
            "model.vision_tower",
        )
        tower = find_scope(build, tower_names, "post_layernorm.weight")
        projector = find_scope(
            build, ("multi_modal_projector", "model.multi_modal_projector"), "mm_input_projection_weight"
        )
        self.normalise = Normaliser(vision.processing, build.weights)
        self.tower = Tower(tower, vision, has_class=False)
        self.merge, self.side = vision.merge, vision.patches_per_side // vision.merge
        width, hidden = vision.projector_width, vision.hidden_size
        weight = projector.weights.take("mm_input_projection_weight", (hidden, width)).t()
        self.projector = build.pack(LinearWeight(weight, None), quantizes=False)
        offset = projector.weights.take("mm_soft_emb_norm.weight", (hidden,)).float() + 1
        self.norm = RMSNorm(build.kernels, offset, vision.norm_eps)

    def encode(self, tiles: Tensor, original_size: tuple[int, int]) -> Pieces:
        features = yield from self.tower.encode(self.normalise(tiles))
        merge, side = self.merge, self.side
        squares = features.view(len(tiles), side, merge, side, merge, -1).mean(dim=(2, 4)).flatten(0, 2)
        return (yield from by_rows(self._project, squares, num_products(self.projector)))

    def work(self, tiles: Tensor) -> int:
        return self.tower.work(len(tiles)) + len(tiles) * self.side**2 * num_products(self.projector)

    def _project(self, features: Tensor) -> Tensor:
        projected: Tensor = self.projector(self.norm(features.contiguous()))
        return projected
