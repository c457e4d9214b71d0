"""FAMILIES: how the images of each family of models are laid out and cut."""

from collections.abc import Callable

from quire.images.gemma3 import Gemma3
from quire.images.idefics3 import Idefics3
from quire.images.layout import ImageFamily
from quire.images.llava import Llava, LlavaNext
from quire.images.qwen2_5_vl import Qwen25VL
from quire.model_config import VisionConfig

FAMILIES: dict[str, Callable[[VisionConfig], ImageFamily]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "idefics3": Idefics3,
    "gemma3": Gemma3,
    "qwen2_vl": Qwen25VL,
    "qwen2_5_vl": Qwen25VL,
}


def family_of(vision: VisionConfig) -> ImageFamily:
    """The family of a model's images."""
    return FAMILIES[vision.family](vision)
