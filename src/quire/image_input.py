"""Images as they travel from a client's call to the encoder: plain values, already resized by `quire.images`."""

from dataclasses import dataclass
from typing import NamedTuple


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


class PlacedRows(NamedTuple):
    """Embeddings of an image that take the place of some tokens of a step."""

    content_hash: bytes
    first_row: int
    """Index of the first of them among the image's embeddings."""
    first_token: int
    """Index of the first token among the step's tokens."""
    count: int


@dataclass(slots=True)
class ImagePlan:
    """A step's orders about images. The runner does them in this order, before it computes any token."""

    dropped: list[bytes]
    """Hashes of embeddings to forget."""
    encoded: list[tuple[bytes, ImagePixels]]
    """(hash, pixels): images to encode; their embeddings are kept under the hash."""
    placed: list[PlacedRows]
    """What takes the place of the embeddings of placeholder tokens."""
