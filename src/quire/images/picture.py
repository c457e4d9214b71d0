"""Pictures: arrays of NumPy, uint8 [height, width, 3] of red, green and blue, and what is done with them.

Pillow resizes, as in transformers' own processors without torchvision, so that encoders see the values that models were
trained on.
"""

from typing import Protocol


class Picture(Protocol):
    """An array of NumPy, which only the functions below import: layouts need no pixels."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: tuple[slice, slice], /) -> "Picture": ...


Size = tuple[int, int]
"""(height, width)"""


def size_of(picture: Picture) -> Size:
    """Height and width of a picture."""
    height, width, *_ = picture.shape
    return height, width


def resized(picture: Picture, size: Size, resample: int) -> Picture:
    """The picture at another size; `resample` is Pillow's filter."""
    import numpy as np
    from PIL import Image

    if size_of(picture) == size:
        return picture
    height, width = size
    return np.asarray(Image.fromarray(np.asarray(picture)).resize((width, height), Image.Resampling(resample)))


def centre(picture: Picture, size: Size) -> Picture:
    """The middle of a picture that is at least as large as `size`."""
    top, left = ((have - want) // 2 for have, want in zip(size_of(picture), size, strict=True))
    return picture[top : top + size[0], left : left + size[1]]


def padded(picture: Picture, size: Size, colour: tuple[int, int, int] = (0, 0, 0)) -> Picture:
    """The picture in the middle of a larger one of `colour`; what cannot be halved goes below and to the right."""
    import numpy as np

    height, width = size_of(picture)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = np.empty((*size, 3), dtype=np.uint8)
    canvas[:] = colour
    canvas[top : top + height, left : left + width] = np.asarray(picture)
    return canvas


def shortest_edge(size: Size, edge: int) -> Size:
    """The size of the same shape whose shorter edge is `edge`, rounded down."""
    height, width = size
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)
