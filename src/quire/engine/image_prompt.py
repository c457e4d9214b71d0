"""ImagePrompt: token ids in which some stand for images, and how images come into the text of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from quire.config import EngineConfig
from quire.engine.image_reader import AsyncImageReader, ImageReader
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.image_input import ImagePixels, ReadImage
from quire.model_config import ModelConfig, VisionConfig
from quire.request import InputSpan


class ImagePrompt(list[int]):
    """Token ids, and what the placeholders among them stand for."""

    def __init__(
        self, token_ids: Sequence[int], text: str | None, inputs: tuple[InputSpan, ...], pixels: tuple[ImagePixels, ...]
    ) -> None:
        super().__init__(token_ids)
        self.text = text
        """The prompt as its author wrote it, with one marker for each image; None if it was given as token ids."""
        self.inputs = inputs
        self.pixels = pixels


class ImageExpander:
    """Puts images into the prompts of one model."""

    def __init__(self, vision: VisionConfig, tokenizer: Tokenizer) -> None:
        self._vision = vision
        self._encode = partial(tokenizer.encode, add_special_tokens=False)
        self._placeholder = tokenizer.id_to_text(vision.image_token_id)
        self.marker = tokenizer.id_to_text(vision.marker_token_id) or self._placeholder
        """What a chat template writes for an image."""

    def expand_text(self, text: str, images: Sequence[ReadImage]) -> str:
        """The text with the placeholders of each image in the place of its marker. Raises `RequestError` if there are
        not as many markers as images."""
        between = text.split(self.marker) if self.marker else [text]
        if len(between) - 1 != len(images):
            raise RequestError(
                f"the prompt holds {self.marker} {len(between) - 1} times and comes with {len(images)} images; texts "
                "may not hold it themselves, and a prompt needs one for each image",
                param="messages",
            )
        parts = [between[0]]
        for image, after in zip(images, between[1:], strict=True):
            parts += (image.text(self._placeholder), after)
        return "".join(parts)

    def expand_tokens(self, token_ids: Sequence[int], images: Sequence[ReadImage]) -> list[int]:
        """The same for a prompt given as token ids."""
        num_markers = list(token_ids).count(self._vision.marker_token_id)
        if num_markers != len(images):
            raise RequestError(
                f"the prompt holds token {self._vision.marker_token_id} ({self.marker}) {num_markers} times and comes "
                f"with {len(images)} images; it needs one for each",
                param="prompt",
            )
        left, expanded = iter(images), list[int]()
        for token_id in token_ids:
            is_marker = token_id == self._vision.marker_token_id
            expanded += self._encode(next(left).text(self._placeholder)) if is_marker else [token_id]
        return expanded

    def locate(self, text: str | None, token_ids: list[int], images: Sequence[ReadImage]) -> ImagePrompt:
        """The expanded token ids with the place of each image. Raises `RequestError` where placeholders are not as the
        images ask for."""
        placeholder, position = self._vision.image_token_id, 0
        inputs: list[InputSpan] = []
        parts = [part for image in images for part in image.parts]
        for part in parts:
            try:
                position = token_ids.index(placeholder, position)
            except ValueError:
                position = len(token_ids)
            end = position + part.num_tokens
            if list(token_ids[position:end]) != [placeholder] * part.num_tokens:
                raise self._misplaced()
            inputs.append(InputSpan(part.content_hash, position, part.num_tokens))
            position = end
        if placeholder in token_ids[position:]:
            raise self._misplaced()
        return ImagePrompt(token_ids, text, tuple(inputs), tuple(part.pixels for part in parts))

    def _misplaced(self) -> RequestError:
        return RequestError(
            f"the prompt holds {self._placeholder} outside its images, or its tokenizer does not know it; leave it out "
            "of texts",
            param="messages",
        )


@dataclass(frozen=True, slots=True)
class ImageSupport:
    """What the front of an engine needs to take images."""

    reader: AsyncImageReader
    expander: ImageExpander
    max_images: int
    """Most images of one request."""

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> "ImageSupport | None":
        """None for a model that reads text only."""
        if model.vision is None or tokenizer is None or not config.max_images:
            return None
        reader = AsyncImageReader(ImageReader.for_model(config, model.vision))
        return cls(reader, ImageExpander(model.vision, tokenizer), config.max_images)


def check_count(num_images: int, max_images: int) -> None:
    """Raise `RequestError` for more images than one request may have."""
    if num_images > max_images:
        raise RequestError(
            f"the request has {num_images} images; at most {max_images} are read (max_images); send fewer",
            param="messages",
            code="too_many_images",
        )


def no_images() -> RequestError:
    """The error for an image that comes to a model which reads none."""
    return RequestError(
        "the request holds an image, and this model reads text only; leave it out, or serve a model that reads images",
        param="messages",
        code="no_images",
    )


def no_truncation() -> RequestError:
    """The error for a prompt with images that is to be cut."""
    return RequestError(
        "truncate_prompt_tokens is set, and a prompt with images cannot be cut; leave it out",
        param="truncate_prompt_tokens",
    )
