"""RunnerSettings: the plain values that a ModelRunner is made with, and what its attention planner needs of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from quire.attention import ALL_POSITIONS, AttentionShape
from quire.kv_cache.storage import KVCache
from quire.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """The plain values that a runner is made with."""

    backend: str
    """A row of BACKENDS."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_threads: int
    """Threads at the start, for which attention is divided."""
    logprobs_memory: int
    """Bytes that log-probabilities may take at once."""
    fast_forward: bool = True
    """Add tokens that a grammar forces without running the model."""
    samples: bool = True
    """False on a rank that leaves sampling to rank 0."""
    reads_hidden: bool = True
    """False on a rank whose hidden states another one reads."""
    batch_invariant: bool = False
    """No bit of a sequence's logits depends on the other sequences of its step."""
    sample_on_device: bool = False
    """Sample on the device, without waiting, where the requests of a step allow it."""
    count_threads: Callable[[], int] | None = None
    """Threads for the next step, where their number may change."""
    max_num_samples: int = 0
    """The most samples of a captured step, drafts included, if that is more than `max_num_seqs`."""


def attention_shapes(settings: RunnerSettings, model_config: ModelConfig, kv_cache: KVCache) -> list[AttentionShape]:
    """What the attention planner has to know, for each KV group."""
    latent = model_config.latent
    shape = AttentionShape(
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        value_dim=0 if latent is None else latent.latent_dim,
        expanded_dims=(0, 0) if latent is None else (latent.head_dim, latent.value_dim),
        block_size=kv_cache.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_tokens=settings.max_num_batched_tokens,
        max_blocks=-(-settings.max_model_len // kv_cache.block_size),
        num_threads=settings.num_threads,
        kv_element_size=kv_cache.element_size,
        batch_invariant=settings.batch_invariant,
        image_tokens=model_config.tokens_of_whole_images,
        device=kv_cache.device,
    )
    windows = [group.window for group in kv_cache.groups]
    if not model_config.is_encoder:
        return [replace(shape, window=window) for window in windows]
    return [replace(shape, window=window, lookahead=window // 2 or ALL_POSITIONS) for window in windows]
