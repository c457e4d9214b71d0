"""GGUF files for the tests, written by llama.cpp's own package: names of tensors come from its table of names.

What llama.cpp's converter does beside renaming (rows of queries and keys, norms of Gemma, stacks of experts) is done
here for each architecture, and written into Quire independently in `quire.gguf.families`.
"""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float32]
PERMUTED = ("llama", "granite", "granitemoe", "smollm3", "arcee")
"""Architectures that llama.cpp rotates in neighbouring pairs, although the original rotates halves."""
GROUPED = ("gptneox", "bloom", "falcon")
TRANSPOSED = ("gpt2",)
_EXPERT = re.compile(r"(model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts)\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
_HEAD_NORM = re.compile(r"model\.layers\.(\d+)\.self_attn\.(q|k)_layernorm\.norms\.(\d+)\.weight")
_SIZES = {
    "context_length": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "block_count": ("num_hidden_layers", "n_layer", "n_layers"),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads", "n_head", "n_heads"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.value_length_mla": ("v_head_dim",),
}
_NUMBERS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "rope.freq_base": ("rope_theta", "rotary_emb_base"),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "attention.scale": ("attention_multiplier",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
_DELTA_NET = {
    "ssm.conv_kernel": "conv_kernel_dim",
    "ssm.state_size": "key_head_dim",
    "ssm.group_count": "num_key_heads",
    "ssm.time_step_rank": "num_value_heads",
}


def write_gguf(
    folder: Path, path: Path, arch: str, block: str = "F32", *, widened: bool = False, **metadata: Any
) -> Path:
    """Convert a checkpoint of Hugging Face's. Matrices are stored as `block`, all else as F32. `widened`: the
    numbers of those blocks are stored in F32. `metadata` replaces what follows from config.json; keys are without the
    architecture, with "__" for a dot."""
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, arch)
    found = {**_metadata(config), **{key.replace("__", "."): value for key, value in metadata.items()}}
    for key, value in found.items():
        _add(writer, key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    for name, array in converted(folder, arch, config).items():
        kind = GGMLQuantizationType[block if array.ndim > 1 and "ffn_gate_inp" not in name else "F32"]
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        elif widened:
            writer.add_tensor(name, quants.dequantize(quants.quantize(array, kind), kind))
        else:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer.json."""
    state = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token["content"] for token in state["added_tokens"]}
    tokens = {index: text for text, index in state["model"]["vocab"].items()} | added
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [tokens[index] for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [control if index in added else normal for index in range(len(tokens))],
        **({"tokenizer.ggml.merges": merges} if merges else {}),
    }


def converted(folder: Path, arch: str, config: dict[str, Any]) -> dict[str, Array]:
    """The tensors under llama.cpp's names, as its converter makes them."""
    num_layers = _first(config, _SIZES["block_count"])
    names = get_tensor_name_map(next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), num_layers)
    tensors: dict[str, Array] = {}
    stacks: dict[str, dict[int, Array]] = {}
    found = {
        name: array.astype(np.float32)
        for original, stored in load_file(folder / "model.safetensors").items()
        for name, array in _split(original, stored, config)
    }
    for original, array in found.items():
        if config.get("tie_word_embeddings") and original == "lm_head.weight":
            continue
        if match := _EXPERT.fullmatch(original):
            _, layer, expert, part = match.groups()
            stacks.setdefault(f"blk.{layer}.{_EXPERT_PARTS[part]}.weight", {})[int(expert)] = array
        elif match := _HEAD_NORM.fullmatch(original):
            layer, part, head = match.groups()
            stacks.setdefault(f"blk.{layer}.attn_{part}_norm.weight", {})[int(head)] = array
        else:
            known = original.removeprefix("transformer.") if arch == "bloom" else original  # as it was published
            name = names.get_name(known, try_suffixes=(".weight", ".bias"))
            assert name is not None, f"llama.cpp has no name for {known}"
            tensors[name] = _changed(array, original, arch, config)
    for name, parts in stacks.items():
        tensors[name] = np.stack([parts[index] for index in range(len(parts))])
    return tensors


def _split(original: str, array: Array, config: dict[str, Any]) -> list[tuple[str, Array]]:
    """What one stored tensor is before it gets llama.cpp's names: experts in one tensor, parts of latents, sinks."""
    stem, _, end = original.rpartition(".")
    kind = config["model_type"]
    if kind == "gpt_oss" and end.startswith(("gate_up_proj", "down_proj")):
        whole, ending = array.astype(np.float32), ".bias" if end.endswith("_bias") else ".weight"
        whole = whole.swapaxes(1, 2) if ending == ".weight" else whole  # [experts, outputs, inputs]
        if end.startswith("down"):
            return [(f"{stem}.down_proj{ending}", whole)]
        return [(f"{stem}.gate_proj{ending}", whole[:, ::2]), (f"{stem}.up_proj{ending}", whole[:, 1::2])]
    if end == "sinks":
        return [(f"{original}.weight", array)]
    if kind == "granitemoe" and original.endswith("input_linear.weight"):
        scope, (gate, up) = stem.removesuffix(".input_linear"), np.split(array, 2, axis=1)
        return [(f"{scope}.experts.w1.weight", gate), (f"{scope}.experts.w3.weight", up)]
    if kind == "granitemoe" and original.endswith("output_linear.weight"):
        return [(f"{stem.removesuffix('.output_linear')}.experts.w2.weight", array)]
    if original.endswith("kv_b_proj.weight"):
        heads = array.reshape(config["num_attention_heads"], -1, array.shape[1])
        keys, values = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
        scope = stem.removesuffix("kv_b_proj")
        return [(f"{scope}k_b_proj.weight", keys.swapaxes(1, 2)), (f"{scope}v_b_proj.weight", values)]
    if original.endswith("linear_attn.in_proj_qkvz.weight"):
        key, value, key_heads = (
            config[f"linear_{each}"] for each in ("key_head_dim", "value_head_dim", "num_key_heads")
        )
        values = config["linear_num_value_heads"] // key_heads * value
        heads = array.reshape(key_heads, 2 * (key + values), -1)
        parts = np.split(heads, [key, 2 * key, 2 * key + values], axis=1)
        q, k, v, z = (part.reshape(-1, array.shape[1]) for part in parts)
        scope = stem.removesuffix("in_proj_qkvz")
        return [(f"{scope}in_proj_qkv.weight", np.concatenate((q, k, v))), (f"{scope}in_proj_z.weight", z)]
    if original.endswith("linear_attn.dt_bias"):
        return [(original.replace("dt_bias", "dt_proj.bias"), array)]
    if original.endswith("e_score_correction_bias"):
        return [(original.replace("_bias", ".bias"), array)]
    return [(original, array)]


def _changed(array: Array, original: str, arch: str, config: dict[str, Any]) -> Array:
    num_heads = _first(config, _SIZES["attention.head_count"])
    num_kv_heads = _kv_heads(config, num_heads)
    if arch in PERMUTED and re.search(r"\.[qk]_proj\.(weight|bias)$", original):
        return interleave(array, num_heads if ".q_proj." in original else num_kv_heads)
    if arch in GROUPED and ".query_key_value." in original:
        return ungroup(array, num_heads, num_kv_heads)
    if arch in TRANSPOSED and array.ndim == 2 and ".h." in original:
        return np.ascontiguousarray(array.T)
    if arch.startswith("gemma") and original.endswith("norm.weight"):
        return array + 1
    if arch == "qwen3next" and original.endswith("norm.weight") and not original.endswith("linear_attn.norm.weight"):
        return array + 1
    if original.endswith("A_log"):
        return -np.exp(array)
    if "conv1d" in original:
        return array.squeeze()
    return array


def interleave(array: Array, num_heads: int) -> Array:
    """A head's two halves become neighbours."""
    return array.reshape(num_heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def ungroup(array: Array, num_heads: int, num_kv_heads: int) -> Array:
    """Queries, key and value of each KV head become all queries, all keys, all values."""
    group = num_heads // num_kv_heads
    heads = array.reshape(num_kv_heads, group + 2, -1, *array.shape[1:])
    parts = [heads[:, :group], heads[:, group : group + 1], heads[:, group + 1 :]]
    return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])


def _kv_heads(config: dict[str, Any], num_heads: int) -> int:
    if config["model_type"] == "falcon":
        return config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    return config.get("num_key_value_heads") or num_heads


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config.json."""
    rope = config.get("rope_parameters") or {}
    flat = {**{key: value for key, value in rope.items() if not isinstance(value, dict)}, **config}
    num_heads = _first(config, _SIZES["attention.head_count"])
    found: dict[str, Any] = {}
    for key, spellings in _SIZES.items():
        value = _first(flat, spellings)
        if value is not None:
            found[key] = int(value)
    for key, spellings in _NUMBERS.items():
        value = _first(flat, spellings)
        if value is not None:
            found[key] = float(value)
    found["attention.head_count_kv"] = _kv_heads(config, num_heads)
    head_dim = found.get("attention.key_length") or found["embedding_length"] // num_heads
    share = _first(flat, ("partial_rotary_factor", "rotary_pct")) or 1.0
    found["rope.dimension_count"] = int(head_dim * share)
    if config.get("kv_lora_rank"):
        rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
        found |= {"rope.dimension_count": rotated, "attention.head_count_kv": 1, "attention.value_length": rank}
        found |= {"attention.key_length": rank + rotated}
        found["attention.key_length_mla"] = config["qk_nope_head_dim"] + rotated
        found["expert_weights_scale"] = float(config["routed_scaling_factor"])
        if config["model_type"] == "deepseek_v3":
            found |= {"expert_gating_func": 2, "expert_weights_norm": config["norm_topk_prob"]}
    if "linear_num_value_heads" in config:
        found |= {key: config[f"linear_{name}"] for key, name in _DELTA_NET.items()}
        found["ssm.inner_size"] = config["linear_value_head_dim"] * config["linear_num_value_heads"]
    if config["model_type"] == "gpt_oss":
        found["expert_feed_forward_length"] = config["intermediate_size"]
    if "use_parallel_residual" in config:
        found["use_parallel_residual"] = config["use_parallel_residual"]
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if "mscale_all_dim" in rope:
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return found


def _first(config: dict[str, Any], spellings: tuple[str, ...]) -> Any:
    return next((config[key] for key in spellings if config.get(key) is not None), None)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
