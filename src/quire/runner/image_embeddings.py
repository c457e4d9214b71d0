"""ImageEmbeddings: the embeddings of images, which take the place of those of placeholder tokens."""

import torch
from torch import Tensor

from quire.image_input import ImagePixels, ImagePlan
from quire.layers.step_context import InputRows
from quire.models.vision.encoder import Encoding, ImageEncoder


class ImageEmbeddings:
    """Kept by content hash. The scheduler decides what is encoded, kept and dropped."""

    def __init__(self, encoder: ImageEncoder | None, device: torch.device) -> None:
        self._encoder = encoder
        self._device = device
        self._kept: dict[bytes, Tensor] = {}
        self._begun: dict[bytes, Encoding] = {}

    def apply(self, plan: ImagePlan) -> InputRows | None:
        """Encode and drop what the plan says; returns the rows that the step's tokens take, None if there are none."""
        for content_hash in plan.dropped:
            self._kept.pop(content_hash, None)
            self._begun.pop(content_hash, None)
        for content_hash, pixels, end, total in plan.encoded:
            encoding = self._begun.pop(content_hash, None) or self._begin(pixels)
            embeddings = encoding.advance(end, total)
            if embeddings is None:
                self._begun[content_hash] = encoding
            else:
                self._kept[content_hash] = embeddings
        if not plan.placed:
            return None
        rows = [self._kept[content_hash][first : first + count] for content_hash, first, _, count in plan.placed]
        tokens = [torch.arange(token, token + count) for _, _, token, count in plan.placed]
        return InputRows(torch.cat(tokens).to(self._device), torch.cat(rows))

    def _begin(self, pixels: ImagePixels) -> Encoding:
        assert self._encoder is not None, "the scheduler takes images only for a model with an encoder"
        data = torch.frombuffer(bytearray(pixels.data), dtype=torch.uint8)
        tiles = data.view(pixels.num_tiles, pixels.height, pixels.width, 3).to(self._device)
        return Encoding(self._encoder, tiles, pixels.original_size)
