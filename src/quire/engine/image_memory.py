"""ImageMemory: what a model's image encoder takes of the memory, and how much of it one step computes."""

from dataclasses import dataclass

from quire.config import EngineConfig
from quire.dtypes import DTYPE_BYTES, FLOAT32_BYTES
from quire.images.families import family_of
from quire.model_config import ModelConfig

MAX_KEPT_IMAGES = 8
"""Images of the largest kind whose embeddings are kept by default."""
MAX_KEPT_TOKENS = 8192
"""Most tokens for them by default, unless one image has more."""
STEP_SHARE = 0.5
"""Work of a step's encoder by the work of its largest step of tokens, where no sequence decodes beside it."""
TEXT_TOKENS = 512
"""Tokens of text beside an image, where the plan counts users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMemory:
    """Counts in tokens, sizes in bytes. All 0 for a model that reads text only."""

    tokens_per_image: int = 0
    """Tokens of the largest image."""
    kept_tokens: int = 0
    """Tokens whose embeddings are kept."""
    step_tokens: int = 0
    """Tokens that a step encodes beside other work; an image that has more takes several steps."""
    operations: int = 0
    """Multiplications and additions for the largest part of an image."""
    weights: int = 0
    """Bytes of the encoder and its projector, which are part of the model's weights."""
    num_bytes: int = 0
    """Kept embeddings, and the activations of the encoder."""


NO_IMAGES = ImageMemory()


def plan_images(
    config: EngineConfig, model: ModelConfig, dtype: str, weight_dtype: str, max_num_batched_tokens: int
) -> ImageMemory:
    """The memory for images; nothing if no request may have one. `dtype` is that of activations."""
    vision = model.vision
    if vision is None or not config.max_images:
        return NO_IMAGES
    family = family_of(vision)
    layout = family.layout(family.largest)
    kept = config.image_cache_tokens
    if kept is None:
        kept = max(max(layout.part_lengths), min(MAX_KEPT_IMAGES * layout.num_tokens, MAX_KEPT_TOKENS))
    patches_per_token = vision.merge**2
    work_of_token = patches_per_token * sum(linear.num_parameters for linear in vision.linears)
    step_work = STEP_SHARE * max_num_batched_tokens * model.spec.active_layer_parameters
    step_tokens = max(1, int(step_work / work_of_token))
    largest_part = max(layout.part_lengths)
    num_patches = patches_per_token * largest_part
    encoded = vision.activation_bytes(num_patches) * DTYPE_BYTES[dtype] // 4
    return ImageMemory(
        tokens_per_image=layout.num_tokens,
        kept_tokens=kept,
        step_tokens=step_tokens,
        operations=2 * largest_part * work_of_token + 4 * num_patches**2 * vision.hidden_size * vision.num_layers,
        weights=sum(linear.weight_bytes(weight_dtype) for linear in vision.linears)
        + sum(vector.size for vector in vision.vectors) * FLOAT32_BYTES,
        num_bytes=kept * model.hidden_size * DTYPE_BYTES[dtype] + encoded,
    )
