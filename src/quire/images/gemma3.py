"""Gemma 3: an image is one square, with a token before and one after its own."""

from quire.images.layout import ImageLayout
from quire.images.picture import Picture, Size, resized
from quire.model_config import VisionConfig


class Gemma3:
    """Satisfies `ImageFamily`."""

    def __init__(self, vision: VisionConfig) -> None:
        self.vision = vision

    def layout(self, size: Size) -> ImageLayout:
        return ImageLayout(("\n\n<start_of_image>", self.vision.whole_image_tokens, "<end_of_image>\n\n"))

    def parts(self, picture: Picture) -> list[list[Picture]]:
        return [[resized(picture, self.largest, self.vision.processing.resample)]]

    @property
    def largest(self) -> Size:
        return (self.vision.image_size, self.vision.image_size)
