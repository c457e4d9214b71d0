"""SchedulerLimits: the sizes that the scheduler is given."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What one step and one request may take."""

    max_num_seqs: int
    """Sequences that run at once."""
    max_num_batched_tokens: int
    """Tokens of a step; at least `max_num_seqs`, so that all sequences can decode in one step."""
    max_model_len: int
    """Tokens of one sequence, prompt and output."""
    max_num_partial_prefills: int = 4
    """Prompts that share what a step has left besides decoding, where they take all of it."""
    whole_prompts: bool = False
    """A prompt is computed in one step or not at all."""
    max_pinned_share: float = 0.5
    """Share of the pool that registered prefixes may hold."""
    background_delay: float = 0.15
    """Share of a client's time to its first token by which one step of the background may delay it."""
    max_kept_image_tokens: int = 0
    """Tokens of images whose embeddings the runner keeps; 0: the model reads no images."""
    whole_images: bool = False
    """The tokens of an image are computed in one step."""
    max_step_image_tokens: int = 0
    """Tokens of images that a step encodes beside other work; a larger image takes several steps."""
