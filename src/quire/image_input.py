"""Images as they travel from a client's call to the encoder: plain values, already resized by `quire.images`."""

from dataclasses import dataclass
from typing import NamedTuple

IMAGE_PART = "image"
"""Type of a message's part that stands for an image, as chat templates know it."""


@dataclass(frozen=True, slots=True)
class ImagePixels:
    """What an encoder reads of one image: tiles of one size, 8 bits a value."""

    data: bytes
    """[num_tiles, height, width, 3], red, green and blue."""
    num_tiles: int
    height: int
    width: int
    original_size: tuple[int, int] = (0, 0)
    """(height, width) before resizing, for an encoder that cuts off what fills up the tiles."""

    @property
    def num_bytes(self) -> int:
        return len(self.data)


class ImagePart(NamedTuple):
    """A part of an image that is encoded by itself."""

    content_hash: bytes
    num_tokens: int
    """Its placeholder tokens in the prompt."""
    pixels: ImagePixels


class ReadImage(NamedTuple):
    """An image that was decoded and resized."""

    pieces: tuple[str | int, ...]
    """What takes the place of its marker in a prompt: texts, and the numbers of placeholder tokens of its parts."""
    parts: tuple[ImagePart, ...]

    def text(self, placeholder: str) -> str:
        """The text itself, where `placeholder` is the text of the placeholder token."""
        return "".join(piece if isinstance(piece, str) else placeholder * piece for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Memory of its pixels."""
        return sum(part.pixels.num_bytes for part in self.parts)


class PlacedRows(NamedTuple):
    """Embeddings of an image that take the place of some tokens of a step."""

    content_hash: bytes
    first_row: int
    """Index of the first of them among the image's embeddings."""
    first_token: int
    """Index of the first token among the step's tokens."""
    num_rows: int


class EncodingOrder(NamedTuple):
    """A part of the work of encoding an image. Work is counted in the image's tokens."""

    content_hash: bytes
    pixels: ImagePixels
    end: float
    """How much is done after the step."""
    total: int
    """Its tokens: with so much done its embeddings are kept."""


@dataclass(slots=True)
class ImagePlan:
    """A step's orders about images. The runner does them in this order, before it computes any token."""

    dropped: list[bytes]
    """Hashes of embeddings to forget."""
    encoded: list[EncodingOrder]
    """Images to encode, or to go on with."""
    placed: list[PlacedRows]
    """What takes the place of the embeddings of placeholder tokens."""
    num_encoded: float = 0.0
    """Tokens' worth of all that is encoded."""
