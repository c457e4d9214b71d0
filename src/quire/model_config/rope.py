"""RopeConfig: rotary position embedding as data, and how config.json spells it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from quire.model_config.config_json import ConfigJson

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ROTARY_LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base, how it is stretched beyond the training length, and what it rotates."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    """Training length in tokens; read for dynamic, llama3 and yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    partial_rotary_factor: float = 1.0
    """Share of a head's elements, the first ones, that are rotated."""
    layout: Literal["half", "interleaved"] = "half"
    """Which two of the D rotated elements turn together. half: i and i + D / 2 (Llama); interleaved: 2 i and 2 i + 1
    (GPT-J)."""

    def rotary_dim(self, head_dim: int) -> int:
        """Elements of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)


def read_rope(config: ConfigJson, max_position: int, head_dim: int) -> RopeConfig:
    """The rotary embedding of a config.json. `max_position` is its max_position_embeddings.

    transformers 5 writes `rope_parameters`, earlier versions wrote `rope_theta` beside `rope_scaling`.
    """
    section = "rope_parameters" if config.value("rope_parameters") else "rope_scaling"
    values: dict[str, Any] = dict(config.value(section) or {})
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise config.refusal(f"{section}.rope_type", rope_type, ", ".join(ROPE_TYPES))

    def number(key: str, default: float | None = None) -> float:
        value = values.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise config.refusal(f"{section}.{key}", value, "a positive number")
        return float(value)

    def optional(key: str) -> float | None:
        return None if values.get(key) is None else number(key)

    original = int(
        number("original_max_position_embeddings", config.value("original_max_position_embeddings") or max_position)
    )
    # Dynamic scaling begins where max_position_embeddings ends; the others name the training length.
    original = max_position if rope_type == "dynamic" else original
    if config.value("rotary_elements") is not None:
        share = _share_of(config, head_dim)
    else:
        share = number("partial_rotary_factor", config.value("partial_rotary_factor") or 1.0)
    if not 0 < int(head_dim * share) <= head_dim or int(head_dim * share) % 2:
        supported = f"a share that rotates an even number of a head's {head_dim} elements"
        raise config.refusal(f"{section}.partial_rotary_factor", share, supported)
    needs_factor = rope_type in ("linear", "dynamic", "llama3")
    return RopeConfig(
        theta=number("rope_theta", config.value("rope_theta") or 10000.0),
        rope_type=rope_type,
        factor=number("factor", None if needs_factor else max_position / original),
        original_max_position=original,
        low_freq_factor=number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        partial_rotary_factor=share,
        layout="interleaved" if config.choice("rotary_layout", ROTARY_LAYOUTS, "half") == "interleaved" else "half",
    )


def _share_of(config: ConfigJson, head_dim: int) -> float:
    """The partial rotary factor of families that give the number of rotated elements."""
    rotary_dim = config.integer("rotary_elements")
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise config.refusal("rotary_elements", rotary_dim, f"an even number of at most a head's {head_dim} elements")
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)
