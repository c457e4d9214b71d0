"""RopeConfig: rotary position embedding as data, and how config.json spells it."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from quire.model_config.config_json import ConfigJson, is_positive
from quire.model_config.windows import read_no_rope_layers

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
ROTARY_LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base, how it is stretched beyond the training length, and what it rotates."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    """Training length in tokens; read for dynamic, llama3, yarn and longrope."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    """longrope's divisors of the frequencies, one for each pair; see `is_long`."""
    short_mscale: float | None = None
    long_mscale: float | None = None
    """Factors of queries and keys within the training length and beyond it, in the place of the usual one
    (Phi-3.5-MoE)."""
    query_scaling_beta: float = 0.0
    """A query at position p is multiplied by 1 + beta ln(1 + floor(p / original_max_position)) (Ministral 3)."""
    partial_rotary_factor: float = 1.0
    """Share of a head's elements, the first ones, that are rotated."""
    sections: tuple[int, ...] = ()
    """Frequencies that turn by the temporal, the vertical and the horizontal position of a token; outside images the
    three are one (Qwen2.5-VL). Empty: all turn by one position."""
    layout: Literal["half", "interleaved"] = "half"
    """Which two of the D rotated elements turn together. half: i and i + D / 2 (Llama); interleaved: 2 i and 2 i + 1
    (GPT-J)."""

    def rotary_dim(self, head_dim: int) -> int:
        """Elements of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def is_long(self, max_model_len: int) -> bool:
        """Whether longrope rotates by its long factors: if sequences may be longer than the training length.

        transformers chooses for each sequence by its length, and computes all keys again when one grows past the
        training length. Keys in a shared cache cannot depend on the length of a sequence, so an engine makes one choice
        for all. By default `max_model_len` is the training length: short factors, and transformers' tokens for every
        sequence. If more is asked for, long factors: transformers' tokens for sequences above the training length.
        """
        return self.rope_type == "longrope" and max_model_len > self.original_max_position


def read_ropes(
    config: ConfigJson, max_position: int, head_dim: int, layer_windows: tuple[int, ...]
) -> tuple[RopeConfig, tuple[RopeConfig | None, ...]]:
    """The rotary embedding of the layers that attend to all positions, and that of every layer where they differ.

    transformers 5 writes `rope_parameters`; earlier versions wrote `rope_theta` beside `rope_scaling`, and Gemma 3's
    layers with a window `rope_local_base_freq`. `max_position` is the config's max_position_embeddings. The rules are
    those of transformers 5:

    - A `rope_scaling` that is not empty replaces the whole of `rope_parameters`, its base too. For Gemma 3 it is laid
      over the object of the full layers.
    - The base is `rope_theta` of the object, else that of the file, else the family's.
    - `original_max_position_embeddings` of the file goes before that of an object without layer types.
    - Keys of another kind of stretch have no effect: `attention_factor` is read for yarn and longrope, mscale for yarn.

    One difference: an object for each type of layer is read in every family. transformers reads it in families whose
    layers have embeddings of their own, and in others ignores it or fails.
    """
    has_local = config.value("rope_local_base_freq") is not None
    if has_local and config.value("sliding_window") is None:
        supported = "a number of positions, since layers with a window have a rotary embedding of their own"
        raise config.refusal("sliding_window", None, supported)
    section, values = _section(config, has_local)
    theta = config.value("rope_theta") or 10000.0
    read = partial(_read_rope, config, max_position=max_position, head_dim=head_dim)
    if not has_local and not values.keys() & LAYER_TYPES:
        full = window = read(section, values, theta, original=config.value("original_max_position_embeddings"))
    else:
        if not values.keys() <= LAYER_TYPES:
            raise config.refusal(section, values, f"an object for each of {', '.join(sorted(LAYER_TYPES))}")
        local_theta = config.value("rope_local_base_freq") or theta
        full = read(f"{section}.full_attention", values.get("full_attention") or {}, theta)
        has_windows = any(layer_windows)
        local = values.get("sliding_attention") or {}
        window = read(f"{section}.sliding_attention", local, local_theta) if has_windows else full
    rotates = _read_rotating_layers(config, layer_windows)
    kinds = zip(layer_windows, rotates, strict=True)
    layers = tuple(None if not turns else window if has_window else full for has_window, turns in kinds)
    return full, layers if set(layers) != {full} else ()


def _section(config: ConfigJson, has_local: bool) -> tuple[str, dict[str, Any]]:
    """The object that describes the rotary embedding, and the name of its key. With `has_local` an object without
    layer types describes the layers that attend to all positions."""
    parameters, scaling = config.object("rope_parameters"), config.object("rope_scaling")
    if not scaling:
        return "rope_parameters", parameters
    if not has_local:
        lost = parameters.get("rope_theta")
        if lost is not None and "rope_theta" not in scaling and config.value("rope_theta") != lost:
            logger.warning(
                "%s: rope_scaling replaces rope_parameters, as in transformers, and with it the base %s; to keep that "
                "base, write rope_theta into rope_scaling",
                config.path,
                lost,
            )
        return "rope_scaling", scaling
    full = parameters.get("full_attention") or {}
    if not isinstance(full, dict):
        raise config.refusal("rope_parameters", parameters, "an object for each of full_attention, sliding_attention")
    return "rope_scaling", {**parameters, "full_attention": {**full, **scaling}}


def _read_rotating_layers(config: ConfigJson, layer_windows: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether each layer rotates its queries and keys. Without a window in config.json no layer is left out."""
    if config.flag("rope_if_asked") and config.value("position_embedding_type") != "rope":
        return (False,) * len(layer_windows)
    if config.flag("rope_in_windows_only") and config.value("sliding_window") is not None:
        return tuple(window > 0 for window in layer_windows)
    return read_no_rope_layers(config, len(layer_windows)) or (True,) * len(layer_windows)


def _read_rope(
    config: ConfigJson,
    section: str,
    values: Mapping[str, Any],
    theta: float,
    *,
    max_position: int,
    head_dim: int,
    original: Any = None,
) -> RopeConfig:
    """The rotary embedding that `values`, an object of config.json, describes; `theta` is its base by default, and
    `original` the training length that goes before its own."""
    if not isinstance(values, Mapping):
        raise config.refusal(section, values, "an object")
    sections = _read_sections(config, section, values, head_dim)
    rope_type = _read_type(config, section, values, has_sections=bool(sections))
    rope_type, stretch = _read_alpha(config, section, values, rope_type, head_dim)

    def number(key: str, default: float | None = None) -> float:
        value = values.get(key, default)
        value = default if value is None else value
        if not is_positive(value):
            raise config.refusal(f"{section}.{key}", value, "a positive number")
        return float(value)  # type: ignore[arg-type]

    def optional(key: str) -> float | None:
        """None also for 0, as transformers reads these numbers."""
        return None if values.get(key) in (None, 0) else number(key)

    if original is not None and rope_type in ("llama3", "yarn", "longrope"):
        original = config.integer("original_max_position_embeddings")
    else:
        original = int(number("original_max_position_embeddings", max_position))
    # Dynamic scaling begins where max_position_embeddings ends; the others name the training length.
    original = max_position if rope_type == "dynamic" else original
    share = _read_share(config, section, values, head_dim)

    def factors(key: str) -> tuple[float, ...]:
        if rope_type != "longrope":
            return ()
        value, count = values.get(key), int(head_dim * share) // 2
        if not isinstance(value, list) or len(value) != count or not all(map(is_positive, value)):
            raise config.refusal(f"{section}.{key}", value, f"a list of {count} positive numbers, one for each pair")
        return tuple(map(float, value))

    has_mscales = config.flag("rope_mscales") and rope_type != "default"
    needs_factor = rope_type in ("linear", "dynamic", "llama3")
    return RopeConfig(
        theta=number("rope_theta", theta) * stretch,
        rope_type=rope_type,
        factor=number("factor", None if needs_factor else max_position / original),
        original_max_position=original,
        low_freq_factor=number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
        attention_factor=optional("attention_factor") if rope_type in ("yarn", "longrope") else None,
        mscale=optional("mscale") if rope_type == "yarn" else None,
        mscale_all_dim=optional("mscale_all_dim") if rope_type == "yarn" else None,
        query_scaling_beta=(optional("llama_4_scaling_beta") or 0.0) if config.flag("scale_queries") else 0.0,
        short_factors=factors("short_factor"),
        long_factors=factors("long_factor"),
        short_mscale=number("short_mscale") if has_mscales else None,
        long_mscale=number("long_mscale") if has_mscales else None,
        partial_rotary_factor=share,
        sections=sections,
        layout=_layout(config),
    )


def _read_type(config: ConfigJson, section: str, values: Mapping[str, Any], *, has_sections: bool) -> str:
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type == "su" or (rope_type == "yarn" and "short_factor" in values):
        rope_type = "longrope"  # as Phi-3's first files call it
    if rope_type == "mrope" and has_sections:
        rope_type = "default"
    if rope_type not in ROPE_TYPES:
        raise config.refusal(f"{section}.rope_type", rope_type, ", ".join(ROPE_TYPES))
    return str(rope_type)


def _read_alpha(
    config: ConfigJson, section: str, values: Mapping[str, Any], rope_type: str, head_dim: int
) -> tuple[str, float]:
    """The type, and a factor of the base: Hunyuan stretches by it, whatever a sequence's length, though its files call
    that dynamic."""
    alpha = values.get("alpha")
    if rope_type != "dynamic" or not config.flag("rope_alpha") or not alpha:
        return rope_type, 1.0
    if not is_positive(alpha):
        raise config.refusal(f"{section}.alpha", alpha, "a positive number")
    return "default", float(alpha ** (head_dim / (head_dim - 2)))


def _read_sections(config: ConfigJson, section: str, values: Mapping[str, Any], head_dim: int) -> tuple[int, ...]:
    """The sections of the frequencies, in families that have them."""
    default = config.value("rope_sections")
    if default is None:
        return ()
    found = values.get("mrope_section", default)
    if not isinstance(found, list) or [type(count) for count in found] != [int] * 3 or sum(found) != head_dim // 2:
        raise config.refusal(f"{section}.mrope_section", found, f"three numbers, {head_dim // 2} in all")
    return tuple(found)


def _layout(config: ConfigJson) -> Literal["half", "interleaved"]:
    """The layout that a family has, or that a flag of its config.json chooses (DeepSeek-V3)."""
    if config.value("interleaves") is not None:
        return "interleaved" if config.flag("interleaves") else "half"
    return "interleaved" if config.choice("rotary_layout", ROTARY_LAYOUTS, "half") == "interleaved" else "half"


def _read_share(config: ConfigJson, section: str, values: Mapping[str, Any], head_dim: int) -> float:
    """The share of a head's elements that is rotated: all, in families whose models rotate whole heads."""
    if config.value("rotary_elements") is not None:
        return _share_of(config, head_dim)
    share = values.get("partial_rotary_factor") if config.reads("partial_rotary_factor") else None
    share = config.value("partial_rotary_factor") if share is None else share
    share = 1.0 if share is None else share
    if not is_positive(share) or not 0 < int(head_dim * share) <= head_dim or int(head_dim * share) % 2:
        supported = f"a share that rotates an even number of a head's {head_dim} elements"
        raise config.refusal(f"{section}.partial_rotary_factor", share, supported)
    return float(share)


def _share_of(config: ConfigJson, head_dim: int) -> float:
    """The partial rotary factor of families that give the number of rotated elements."""
    rotary_dim = config.integer("rotary_elements")
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise config.refusal("rotary_elements", rotary_dim, f"an even number of at most a head's {head_dim} elements")
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)
