"""Qwen2-VL and Qwen2.5-VL: an image keeps its shape. Its edges become whole tokens, its area lies within two bounds."""

import math

from quire.errors import RequestError
from quire.images.layout import ImageLayout
from quire.images.picture import Picture, Size, resized, size_of
from quire.model_config import VisionConfig

_MOST_ELONGATED = 200


class Qwen25VL:
    """Satisfies `ImageFamily`."""

    def __init__(self, vision: VisionConfig) -> None:
        self.processing = vision.processing
        self.edge = vision.patch_size * vision.merge
        """Pixels of a token in each direction."""

    def layout(self, size: Size) -> ImageLayout:
        height, width = self._fitted(size)
        return ImageLayout(((height // self.edge) * (width // self.edge),))

    def parts(self, picture: Picture) -> list[list[Picture]]:
        return [[resized(picture, self._fitted(size_of(picture)), self.processing.resample)]]

    @property
    def largest(self) -> Size:
        side = math.isqrt(self.processing.size.longest_edge)
        return self._fitted((side, side))

    def _fitted(self, size: Size) -> Size:
        (height, width), edge = size, self.edge
        if max(size) > _MOST_ELONGATED * min(size):
            raise RequestError(
                f"the image has {width} × {height} pixels; one edge may be at most {_MOST_ELONGATED} times the other",
                param="messages",
                code="invalid_image",
            )
        least, most = self.processing.size.shortest_edge, self.processing.size.longest_edge
        rounded = round(height / edge) * edge, round(width / edge) * edge
        if rounded[0] * rounded[1] > most:
            shrink = math.sqrt(height * width / most)
            height, width = (max(edge, math.floor(length / shrink / edge) * edge) for length in size)
            return height, width
        if rounded[0] * rounded[1] < least:
            grow = math.sqrt(least / (height * width))
            height, width = (math.ceil(length * grow / edge) * edge for length in size)
            return height, width
        return rounded
