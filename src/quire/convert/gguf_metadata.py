"""metadata_of: what a GGUF file says of a model, from its config.json; and a check that readers find the same model."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from quire.convert.gguf_names import GgufNames
from quire.errors import CheckpointError
from quire.gguf.header import Value
from quire.model_config import ModelConfig, read_json
from quire.model_config.config_json import ConfigJson
from quire.model_config.rope import RopeConfig

_FLOATS = ("scale", "freq_base", "freq_base_swa", "softcapping", "epsilon", "factor")
"""Ends of keys whose numbers are floats, also where config.json writes an integer."""
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_OF_THE_FILE = frozenset(
    {
        *("architecture", "checkpoint_dtype", "block_bytes", "bos_token_id", "eos_token_ids", "stored", "kept"),
        *("pooling", "max_text_length", "packed_as", "computed_by"),
    }
)
"""Fields of `ModelConfig` that say how a model is stored or used, not what it computes."""
_TOLERANCE = 1e-6
"""GGUF holds floats of 32 bits."""


def metadata_of(config: ModelConfig, names: GgufNames, source: Path) -> dict[str, Value]:
    """The keys of a model. Raises `CheckpointError` for one that llama.cpp's keys cannot describe."""
    prefix = names.architecture
    reader = ConfigJson(source / "config.json", read_json(source / "config.json"))
    epsilon = "layer_norm_rms_epsilon" if config.norm == "rms_norm" else "layer_norm_epsilon"
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{epsilon}": float(config.norm_eps),
        "vocab_size": config.vocab_size,
        **_rope(config, source),
    }
    if config.clip_qkv:
        values["attention.clamp_kqv"] = config.clip_qkv
    for key, stored in names.family.settings.items():
        value = _local_theta(config) if key == "rope_local_base_freq" else reader.value(key)
        if value is not None:
            values[stored] = value
    typed = {key: float(value) if key.endswith(_FLOATS) else value for key, value in values.items()}
    return {
        "general.architecture": prefix,
        "general.name": source.name,
        **{f"{prefix}.{key}": value for key, value in typed.items()},
        **_sampling(source),
    }


def factors_of(rope: RopeConfig | None, head_dim: int) -> dict[str, list[float]]:
    """Tensors that divide the frequencies of the rotary embedding, by their names."""
    if rope is not None and rope.rope_type == "longrope":
        return {
            "rope_factors_long.weight": list(rope.long_factors),
            "rope_factors_short.weight": list(rope.short_factors),
        }
    if rope is None or rope.rope_type != "llama3":
        return {}
    dim = rope.rotary_dim(head_dim)
    return {"rope_freqs.weight": [_llama3_factor(rope, rope.theta ** (2 * pair / dim)) for pair in range(dim // 2)]}


def check_read_alike(config: ModelConfig, written: Path) -> None:
    """Raise `CheckpointError` unless a written file describes the model that it was made of."""
    found = ModelConfig.from_folder(written)
    skipped = _OF_THE_FILE | ({"rope", "layer_ropes"} if config.rope and config.rope.rope_type == "llama3" else set())
    for field in fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(found, field.name)
        if field.name not in skipped and not _are_alike(ours, theirs):
            raise CheckpointError(
                f"this {config.architecture} cannot be written as GGUF: its {field.name} is {str(ours)[:200]}, and a "
                f"reader of the file would take it for {str(theirs)[:200]}"
            )


def _llama3_factor(rope: RopeConfig, inverse_frequency: float) -> float:
    """What Llama 3's rule divides one frequency by."""
    wavelength = 2 * math.pi * inverse_frequency
    turns = rope.original_max_position / wavelength
    if turns < rope.low_freq_factor:
        return rope.factor
    if turns > rope.high_freq_factor:
        return 1.0
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def _rope(config: ModelConfig, source: Path) -> dict[str, Any]:
    rope = config.rope
    if rope is None:
        return {}
    values: dict[str, Any] = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.rotary_dim(config.head_dim)}
    if rope.rope_type in ("default", "llama3"):
        return values
    if rope.rope_type == "longrope":
        values["rope.scaling.original_context_length"] = rope.original_max_position
        return values | ({} if rope.attention_factor is None else {"rope.scaling.attn_factor": rope.attention_factor})
    if rope.rope_type not in ("linear", "yarn"):
        raise CheckpointError(
            f"{source}: rope_type {rope.rope_type} cannot be written as GGUF; supported: "
            "default, linear, yarn, llama3, longrope"
        )
    values |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        values["rope.scaling.original_context_length"] = rope.original_max_position
        values |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
    return values


def _local_theta(config: ModelConfig) -> float | None:
    """The base of the layers with a window, where layers differ in it."""
    ropes = [config.rope_of(layer) for layer, window in enumerate(config.layer_windows) if window]
    return None if not ropes or ropes[0] is None else ropes[0].theta


def _sampling(source: Path) -> dict[str, Value]:
    path = source / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    kinds = {"top_k": int}
    return {
        f"general.sampling.{key}": kinds.get(name, float)(found[name])
        for name, key in _SAMPLING.items()
        if isinstance(found.get(name), int | float) and not isinstance(found[name], bool)
    }


def _are_alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        if ours is None or theirs is None:
            return ours is theirs
        return math.isclose(ours, theirs, rel_tol=_TOLERANCE)
    if is_dataclass(ours) and type(ours) is type(theirs):
        return all(_are_alike(getattr(ours, each.name), getattr(theirs, each.name)) for each in fields(ours))
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_are_alike, ours, theirs))
    return bool(ours == theirs)
