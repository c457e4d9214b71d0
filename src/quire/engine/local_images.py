"""LocalImages: images in the prompts of `LLM`, by vLLM's names."""

from collections.abc import Mapping, Sequence
from typing import Any

from quire.config import EngineConfig
from quire.engine.image_prompt import ImageExpander, ImagePrompt, check_count
from quire.engine.image_reader import ImageReader
from quire.engine.message_images import local_bytes
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.model_config import VisionConfig


class LocalImages:
    """Reads images and puts them into prompts."""

    def __init__(self, config: EngineConfig, vision: VisionConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._reader = ImageReader.for_model(config, vision)
        self._expander = ImageExpander(vision, tokenizer)
        self._max_images = config.max_images

    @property
    def marker(self) -> str:
        """What stands for an image in the text of a prompt."""
        return self._expander.marker

    def prompt(self, prompt: Mapping[str, Any], sources: Sequence[object]) -> ImagePrompt:
        """The prompt with its images. Raises `RequestError` for what cannot be read or does not fit together."""
        check_count(len(sources), self._max_images)
        images = [self._reader.read(local_bytes(source)) for source in sources]
        if "prompt_token_ids" in prompt:
            token_ids = self._expander.expand_tokens(prompt["prompt_token_ids"], images)
            return self._expander.locate(prompt.get("prompt"), token_ids, images)
        text = prompt.get("prompt")
        if not isinstance(text, str):
            raise RequestError("a prompt with multi_modal_data has no prompt or prompt_token_ids", param="prompt")
        expanded = self._expander.expand_text(text, images)
        token_ids = self._tokenizer.encode(expanded, add_special_tokens=prompt.get("add_special_tokens", True))
        return self._expander.locate(text, token_ids, images)

    def close(self) -> None:
        """End the process that reads images."""
        self._reader.close()


def read_sources(prompt: Mapping[str, Any]) -> list[object]:
    """The images of a prompt's `multi_modal_data`. Raises `RequestError` for anything else in it."""
    data = prompt.get("multi_modal_data")
    if not data:
        return []
    if not isinstance(data, Mapping) or data.keys() != {"image"}:
        raise RequestError(
            f"multi_modal_data holds {sorted(data) if isinstance(data, Mapping) else type(data).__name__}; it may hold "
            "image, one or a list",
            param="multi_modal_data",
        )
    images = data["image"]
    return list(images) if isinstance(images, list | tuple) else [images]
