"""LLaVA: an image is one square (1.5), or a square and the tiles of the grid that fits it best (1.6)."""

import math

from quire.images.grid import best_grid, unpadded
from quire.images.layout import ImageLayout
from quire.images.picture import Picture, Size, centre, padded, resized, shortest_edge, size_of
from quire.model_config import VisionConfig


class Llava:
    """Satisfies `ImageFamily`."""

    def __init__(self, vision: VisionConfig) -> None:
        self.vision = vision
        self.processing = vision.processing

    def layout(self, size: Size) -> ImageLayout:
        return ImageLayout((self.vision.patches_per_side**2 + self.vision.keeps_class,))

    def parts(self, picture: Picture) -> list[list[Picture]]:
        if self.processing.pads_to_square:
            edge = max(size_of(picture))
            red, green, blue = (int(value * 255) for value in self.processing.mean)
            picture = padded(picture, (edge, edge), (red, green, blue))
        return [[self._square(picture)]]

    @property
    def largest(self) -> Size:
        return (self.vision.image_size, self.vision.image_size)

    def _square(self, picture: Picture) -> Picture:
        processing = self.processing
        wanted, size = processing.size, (processing.size.height, processing.size.width)
        if wanted.shortest_edge:
            size = shortest_edge(size_of(picture), wanted.shortest_edge)
        picture = resized(picture, size, processing.resample)
        return picture if processing.crop is None else centre(picture, processing.crop)


class LlavaNext(Llava):
    """The first tile is the whole image, squeezed into a square."""

    def layout(self, size: Size) -> ImageLayout:
        vision, side = self.vision, self.vision.patches_per_side
        rows, columns = (edge // vision.patch_size for edge in best_grid(size, vision.grid_pinpoints))
        top, left = unpadded(size, (rows, columns))
        rows, columns = rows - 2 * top, columns - 2 * left
        return ImageLayout((side**2 + vision.keeps_class + rows * (columns + 1),))

    def parts(self, picture: Picture) -> list[list[Picture]]:
        vision, resample = self.vision, self.processing.resample
        edge = vision.image_size
        height, width = size_of(picture)
        grid = best_grid((height, width), vision.grid_pinpoints)
        scale_y, scale_x = grid[0] / height, grid[1] / width
        if scale_x < scale_y:
            inner = min(math.ceil(height * scale_x), grid[0]), grid[1]
        else:
            inner = grid[0], min(math.ceil(width * scale_y), grid[1])
        large = padded(resized(picture, inner, resample), grid)
        tiles = [
            large[top : top + edge, left : left + edge]
            for top in range(0, grid[0], edge)
            for left in range(0, grid[1], edge)
        ]
        return [[self._square(tile) for tile in (resized(picture, (edge, edge), resample), *tiles)]]

    @property
    def largest(self) -> Size:
        return max(self.vision.grid_pinpoints, key=lambda size: self.layout(size).num_tokens)
