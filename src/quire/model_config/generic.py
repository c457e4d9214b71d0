"""generic_fields: the shape of a model whose family Quire does not know, by the usual spellings of its numbers.

For `quire plan`, which plans such a model as an estimate, and for models that transformers computes, where what is read
here is checked against the model itself.
"""

import json
from pathlib import Path
from typing import Any

from quire.dtypes import DTYPE_BYTES
from quire.errors import CheckpointError
from quire.model_config.experts import RouterConfig
from quire.model_config.rope import RopeConfig

MAX_LAYERS = 4096
"""Layers that are read from a config.json; published models have some hundred at most."""
_SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config", "language_model")
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "n_embed", "embed_dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim", "head_size"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "inner_dim", "hidden_dim"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "n_vocab"),
    "max_position": (
        *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length"),
        *("model_max_length", "context_length"),
    ),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_active": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "num_selected_experts"),
    "expert_width": ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"),
    "shared_width": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "num_shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "first_dense": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
}
"""What is read → the keys that say it, by preference."""
_PLAIN_ACTIVATIONS = frozenset({"relu", "relu2", "gelu", "gelu_new", "gelu_fast", "gelu_python", "quick_gelu"})
"""Activations whose MLPs usually have no gate."""


def generic_fields(path: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that `whole`, the config.json at `path`, gives. Raises `CheckpointError` for a file
    without sizes."""
    section = next((key for key in _SECTIONS if isinstance(whole.get(key), dict)), None)
    values = {**whole, **(whole[section] if section else {})}
    read = _Sizes(path, values)
    hidden, layers, heads = read("hidden_size"), read("num_layers", most=MAX_LAYERS), read("num_heads")
    head_dim = read("head_dim", max(1, hidden // heads))
    kv_heads = read("num_kv_heads", 1 if values.get("multi_query") is True else heads)
    inner = read("intermediate_size", 4 * hidden)
    experts = read("num_experts", 0)
    expert_width = read("expert_width", inner)
    first_dense = read("first_dense", 0)
    activations = [values.get(key) for key in ("hidden_act", "hidden_activation", "activation_function", "activation")]
    plain = any(isinstance(name, str) and name in _PLAIN_ACTIVATIONS for name in activations)
    named = whole.get("architectures")
    dtype = values.get("dtype") or values.get("torch_dtype")
    return {
        "architecture": str(named[0] if isinstance(named, list) and named else whole.get("model_type", "unnamed")),
        "vocab_size": read("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": read("max_position", 4096),
        "gated_mlp": not plain,
        "qkv_bias": values.get("attention_bias") is True or values.get("qkv_bias") is True,
        "num_experts": experts,
        "num_experts_per_token": min(experts, read("num_active", 1)),
        "dense_layers": frozenset(range(min(layers, first_dense))) if experts else frozenset(),
        "router": RouterConfig(),
        "expert_intermediate_size": expert_width,
        "shared_expert_intermediate_size": read("shared_width", read("num_shared", 0) * expert_width),
        "rope": RopeConfig(),
        "tie_word_embeddings": values.get("tie_word_embeddings") is True,
        "checkpoint_dtype": dtype if isinstance(dtype, str) and dtype in DTYPE_BYTES else "bfloat16",
    }


class _Sizes:
    """Reads sizes under their spellings. Of a list, which names a size for each layer, the largest counts."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path, self._values = path, values

    def __call__(self, name: str, default: int | None = None, *, most: int = 2**31) -> int:
        keys = _SPELLINGS[name]
        key = next((key for key in keys if self._values.get(key) is not None), keys[0])
        value = self._values.get(key)
        value = default if value is None else value
        if isinstance(value, list) and value and all(type(size) is int and size > 0 for size in value):
            value = max(value)
        if type(value) is not int or not (0 if default == 0 else 1) <= value <= most:
            shown = "missing" if value is None else json.dumps(value)[:200]
            raise CheckpointError(
                f"{self._path}: {key} is {shown}; supported: an integer up to {most} (also spelled {', '.join(keys)})"
            )
        return value
