"""ImageLayout: how an image stands in a prompt, and the families that decide it.

Nothing here reads pixels: a layout follows from an image's size, so that prompts can be counted without images.
"""

from dataclasses import dataclass
from typing import Protocol

from quire.images.picture import Picture, Size


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """What takes the place of an image's marker in the text of a prompt."""

    pieces: tuple[str | int, ...]
    """Texts, and for each part of the image the number of its placeholder tokens. A part is encoded by itself."""

    @property
    def part_lengths(self) -> tuple[int, ...]:
        return tuple(piece for piece in self.pieces if isinstance(piece, int))

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens of all parts."""
        return sum(self.part_lengths)


class ImageFamily(Protocol):
    """How one family of models lays out and cuts an image. Made of a `VisionConfig`."""

    def layout(self, size: Size) -> ImageLayout:
        """The layout of an image of this size. Raises `RequestError` for a size that the family does not take."""
        ...

    def parts(self, picture: Picture) -> list[list[Picture]]:
        """The tiles of every part of the layout; those of one part have one size."""
        ...

    @property
    def largest(self) -> Size:
        """The size of an image that has as many tokens as any."""
        ...
