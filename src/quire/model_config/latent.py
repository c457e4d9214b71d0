"""LatentShape: multi-head latent attention (MLA), which keeps one row a token for all heads (DeepSeek-V2)."""

import math
from dataclasses import dataclass

from quire.model_config.config_json import ConfigJson
from quire.model_config.rope import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Sizes of latent attention, in elements.

    A token keeps a rotated key of `rope_dim` that all heads share, then a latent of `latent_dim` from which a matrix of
    each head makes the rest of its key and its value.
    """

    latent_dim: int
    query_latent_dim: int
    """Width between the two matrices that make queries; 0: one matrix makes them."""
    nope_dim: int
    """The part of a head's query and key that is not rotated."""
    rope_dim: int
    value_dim: int
    """A head's value."""

    @property
    def row_dim(self) -> int:
        """What a token keeps."""
        return self.rope_dim + self.latent_dim

    @property
    def head_dim(self) -> int:
        """A head's query or key."""
        return self.rope_dim + self.nope_dim

    def scale(self, rope: RopeConfig | None) -> float:
        """Factor of the scores. A stretched rotary embedding raises it, which is how DeepSeek applies yarn's mscale."""
        scale: float = self.head_dim**-0.5
        if rope is None or rope.rope_type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
            return scale
        mscale = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1
        return scale * mscale * mscale


def read_latent(config: ConfigJson) -> LatentShape | None:
    """The sizes of a config.json; None for a family whose attention keeps keys and values."""
    if not config.flag("latent_attention"):
        return None
    rope_dim = config.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise config.refusal("qk_rope_head_dim", rope_dim, "an even number")
    return LatentShape(
        latent_dim=config.integer("kv_lora_rank"),
        query_latent_dim=0 if config.value("q_lora_rank") is None else config.integer("q_lora_rank"),
        nope_dim=config.integer("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=config.integer("v_head_dim"),
    )
