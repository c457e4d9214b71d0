"""Idefics3 and SmolVLM: a large image is cut into tiles, each with tokens that say its place, and seen as a whole."""

import math

from quire.images.layout import ImageLayout
from quire.images.picture import Picture, Size, resized, size_of
from quire.model_config import VisionConfig

_LARGEST_EDGE = 4096
_FAKE, _WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3:
    """Satisfies `ImageFamily`."""

    def __init__(self, vision: VisionConfig) -> None:
        self.vision = vision
        self.processing = vision.processing
        self.num_tokens = (vision.patches_per_side // vision.merge) ** 2

    def layout(self, size: Size) -> ImageLayout:
        rows, columns = self._grid(self._fitted(size))
        pieces: list[str | int] = []
        for row in range(rows):
            for column in range(columns):
                pieces += (f"{_FAKE}<row_{row + 1}_col_{column + 1}>", self.num_tokens)
            pieces.append("\n")
        return ImageLayout((*pieces, "\n" * bool(pieces) + _FAKE + _WHOLE, self.num_tokens, _FAKE))

    def parts(self, picture: Picture) -> list[list[Picture]]:
        edge, resample = self.vision.image_size, self.processing.resample
        picture = resized(picture, self._scaled(size_of(picture)), resample)
        if not self.processing.splits:
            return [[resized(picture, (edge, edge), resample)]]
        picture = resized(picture, self._rounded_up(size_of(picture)), resample)
        rows, columns = self._grid(size_of(picture))
        tiles = [
            picture[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
            for row in range(rows)
            for column in range(columns)
        ]
        return [[tile] for tile in (*tiles, resized(picture, (edge, edge), resample))]

    @property
    def largest(self) -> Size:
        edge = self.processing.size.longest_edge or self.vision.image_size
        return (edge, edge)

    def _fitted(self, size: Size) -> Size:
        """The size from which tiles are cut."""
        size = self._scaled(size)
        return self._rounded_up(size) if self.processing.splits else (self.vision.image_size, self.vision.image_size)

    def _grid(self, size: Size) -> Size:
        """Rows and columns of tiles; 0 and 0 for an image that is seen as a whole only."""
        edge = self.vision.image_size
        return (0, 0) if max(size) <= edge else (size[0] // edge, size[1] // edge)

    def _scaled(self, size: Size) -> Size:
        """The size of the same shape whose longer edge is as configured; the shorter one is even."""
        wanted = self.processing.size
        if not wanted.longest_edge:
            return wanted.height, wanted.width
        (height, width), longest = size, wanted.longest_edge
        shape = width / height
        if width >= height:
            height = int(longest / shape)
            height, width = height + height % 2, longest
        else:
            width = int(longest * shape)
            height, width = longest, width + width % 2
        height, width = max(height, 1), max(width, 1)
        shape = width / height
        if width >= height and width > _LARGEST_EDGE:
            height, width = int(_LARGEST_EDGE / shape), _LARGEST_EDGE
        elif height > _LARGEST_EDGE:
            height, width = _LARGEST_EDGE, int(_LARGEST_EDGE * shape)
        return max(height, 1), max(width, 1)

    def _rounded_up(self, size: Size) -> Size:
        """The size in whole tiles, the longer edge first."""
        (height, width), edge = size, self.vision.image_size
        shape = width / height
        if width >= height:
            width = math.ceil(width / edge) * edge
            height = math.ceil(int(width / shape) / edge) * edge
        else:
            height = math.ceil(height / edge) * edge
            width = math.ceil(int(height * shape) / edge) * edge
        return max(height, edge), max(width, edge)
