"""Pictures: arrays uint8 [height, width, 3] of red, green and blue, and what is done with them.

Pillow resizes, as in transformers' own processors without torchvision, so that encoders see the values that models were
trained on.
"""

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Size = tuple[int, int]
"""(height, width)"""


def resized(picture: Picture, size: Size, resample: int) -> Picture:
    """The picture at another size; `resample` is Pillow's filter."""
    from PIL import Image

    if picture.shape[:2] == size:
        return picture
    height, width = size
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling(resample)))


def centre(picture: Picture, size: Size) -> Picture:
    """The middle of a picture that is at least as large as `size`."""
    top, left = ((have - want) // 2 for have, want in zip(picture.shape[:2], size, strict=True))
    return picture[top : top + size[0], left : left + size[1]]


def padded(picture: Picture, size: Size, colour: tuple[int, int, int] = (0, 0, 0)) -> Picture:
    """The picture in the middle of a larger one of `colour`; what cannot be halved goes below and to the right."""
    height, width = picture.shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = np.empty((*size, 3), dtype=np.uint8)
    canvas[:] = colour
    canvas[top : top + height, left : left + width] = picture
    return canvas


def shortest_edge(size: Size, edge: int) -> Size:
    """The size of the same shape whose shorter edge is `edge`, rounded down."""
    height, width = size
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)
