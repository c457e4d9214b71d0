"""The grid of tiles that LLaVA 1.6 cuts an image into, and what of it is padding."""

from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width)"""


def best_grid(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The size of `pinpoints` that keeps most of an image's pixels, and of those the one that wastes fewest."""
    height, width = size

    def merit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def unpadded(original: Size, padded: Size) -> Size:
    """(rows at the top and as many below, columns on the left and as many on the right) that are padding, where an
    image of size `original` was scaled into `padded` with its shape kept."""
    (height, width), (padded_height, padded_width) = original, padded
    if width / height > padded_width / padded_height:
        return (padded_height - int(round(height * (padded_width / width), 7))) // 2, 0
    return 0, (padded_width - int(round(width * (padded_height / height), 7))) // 2
