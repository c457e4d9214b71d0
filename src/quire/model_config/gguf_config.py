"""What the metadata of a GGUF file say, in the words of config.json, and what tensors it has where metadata are silent.

Rules that llama.cpp holds in its code and not in the file are here: the factor of Gemma's scores, tokens that end a
turn by their text.
"""

import math
from typing import Any

from quire.errors import CheckpointError
from quire.gguf.families import Family
from quire.gguf.file import GgufFile
from quire.gguf.names import family_of
from quire.model_config.architectures import ARCHITECTURES

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CONTROL, _USER_DEFINED = 3, 4
_ENDS_OF_TURNS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<end_of_utterance>", "<turn|>"),
    }
)
"""Control tokens after which llama.cpp ends an answer, whatever the metadata say."""
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_NUM_LAYERS_OF_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_MAX_VOCABULARY = 1 << 24
_EXPERTS = "_exps."


def config_of(file: GgufFile) -> dict[str, Any]:
    """The content of config.json. Raises `CheckpointError` for what is missing or out of range."""
    family, prefix = family_of(file), f"{file.architecture}."
    sizes = _sizes(file, prefix)
    values = {
        **sizes,
        **_settings(file, family, prefix),
        **_biases(file),
        **_rope(file, family, prefix, sizes),
        **_of_falcon(file, sizes),
        **_of_latents(file, prefix),
        **_of_delta_nets(file, sizes),
        "rms_norm_eps": _norm_eps(file, prefix),
        "query_pre_attn_scalar": _query_scalar(file, sizes),
        "multi_query": sizes["num_key_value_heads"] == 1,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "alibi_bias_max": file.number(f"{prefix}attention.max_alibi_bias", 8.0),
        "clip_qkv": file.number(f"{prefix}attention.clamp_kqv", 0.0) or None,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_tokens_of(file),
    }
    spelling = ARCHITECTURES[family.architecture].names
    return {
        "architectures": [family.architecture],
        "dtype": _dtype(file),
        **{spelling.get(key, key): value for key, value in values.items()},
    }


def sampling_of(file: GgufFile) -> dict[str, Any]:
    """The content of generation_config.json."""
    found = {name: file.metadata.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
    return {name: value for name, value in found.items() if value is not None}


def end_tokens_of(file: GgufFile) -> list[int]:
    """Tokens that end an answer: those that the metadata name, and those that llama.cpp knows by their text."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [
        file.integer(f"tokenizer.ggml.{key}", minimum=0) for key in keys if f"tokenizer.ggml.{key}" in file.metadata
    ]
    tokens = file.texts("tokenizer.ggml.tokens")
    if "tokenizer.ggml.token_type" not in file.metadata:
        return list(dict.fromkeys(named))
    kinds = file.numbers("tokenizer.ggml.token_type", len(tokens))
    special = (index for index, text in enumerate(tokens) if text in _ENDS_OF_TURNS)
    known = [index for index in special if kinds[index] in (_CONTROL, _USER_DEFINED)]
    return list(dict.fromkeys([*named, *known]))


def block_bytes_of(file: GgufFile) -> int:
    """Memory of the weights of a file with blocks of few bits; 0 for one of floats. If some matrices of
    a layer's experts are floats, all of them are widened to 16 bits."""
    matrices = [(name, tensor) for name, tensor in file.tensors.items() if len(tensor.shape) > 1]
    if all(tensor.block.is_float for _, tensor in matrices):
        return 0
    mixed = {_layer_of(name) for name, tensor in matrices if _EXPERTS in name and tensor.block.is_float}
    widened = {name for name, _ in matrices if _EXPERTS in name and _layer_of(name) in mixed}
    kept = sum(tensor.end - tensor.begin for name, tensor in file.tensors.items() if name not in widened)
    return kept + sum(2 * math.prod(file.tensors[name].shape) for name in widened)


def _layer_of(name: str) -> str:
    """The layer's part of a name such as blk.7.ffn_up_exps.weight."""
    return name.rpartition(".ffn_")[0]


def _sizes(file: GgufFile, prefix: str) -> dict[str, Any]:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2 or table.shape[0] > _MAX_VOCABULARY:
        raise CheckpointError(
            f"{file.path}: tensor token_embd.weight is {'missing' if table is None else list(table.shape)}; expected "
            f"[vocabulary, embedding_length] with at most {_MAX_VOCABULARY} tokens"
        )
    hidden, num_heads = file.integer(f"{prefix}embedding_length"), file.integer(f"{prefix}attention.head_count")
    if table.shape[1] != hidden:
        raise file.refusal(f"{prefix}embedding_length", f"{table.shape[1]}, the width of token_embd.weight")
    head_dim = file.integer(f"{prefix}attention.key_length", max(1, hidden // num_heads))
    is_latent = f"{prefix}attention.kv_lora_rank" in file.metadata
    if not is_latent and file.integer(f"{prefix}attention.value_length", head_dim) != head_dim:
        raise file.refusal(f"{prefix}attention.value_length", f"{head_dim}, the length of keys")
    return {
        "vocab_size": table.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{prefix}feed_forward_length", 4 * hidden),
        "num_hidden_layers": file.integer(f"{prefix}block_count"),
        "num_attention_heads": num_heads,
        # All heads share a latent row, which llama.cpp counts as one KV head.
        "num_key_value_heads": num_heads if is_latent else file.integer(f"{prefix}attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.integer(f"{prefix}context_length"),
    }


def _settings(file: GgufFile, family: Family, prefix: str) -> dict[str, Any]:
    """The keys that the family's row names; a window of 0 is none."""
    found = {key: file.metadata.get(prefix + stored) for key, stored in family.settings.items()}
    values: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    if "sliding_window" in found:
        values["sliding_window"] = values.get("sliding_window") or None
    return {**family.values, **values}


def _biases(file: GgufFile) -> dict[str, Any]:
    """Flags that a file says by its tensors."""
    attention = any(f"blk.0.{part}.bias" in file.tensors for part in ("attn_q", "attn_qkv", "attn_kv_a_mqa"))
    return {
        "attention_bias": attention,
        "qkv_bias": attention,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
    }


def _of_falcon(file: GgufFile, sizes: dict[str, Any]) -> dict[str, Any]:
    if file.architecture != "falcon":
        return {}
    num_norms = 2 if "blk.0.attn_norm_2.weight" in file.tensors else 1
    return {"new_decoder_architecture": sizes["num_key_value_heads"] > 1, "num_ln_in_parallel_attn": num_norms}


def _of_latents(file: GgufFile, prefix: str) -> dict[str, Any]:
    """Sizes of latent attention (DeepSeek); a file without a rank of queries has one matrix for them."""
    if f"{prefix}attention.kv_lora_rank" not in file.metadata:
        return {}
    rope_dim = file.integer(f"{prefix}rope.dimension_count")
    length = file.integer(f"{prefix}attention.key_length_mla", file.integer(f"{prefix}attention.key_length"))
    if length <= rope_dim:
        raise file.refusal(f"{prefix}attention.key_length_mla", f"more than the {rope_dim} rotated elements")
    rank = file.metadata.get(f"{prefix}attention.q_lora_rank")
    return {"qk_nope_head_dim": length - rope_dim, "q_lora_rank": rank or None}


def _of_delta_nets(file: GgufFile, sizes: dict[str, Any]) -> dict[str, Any]:
    """Which layers of Qwen3-Next are gated delta nets, and the length of a head's values."""
    if file.architecture != "qwen3next":
        return {}
    num_heads, inner = file.integer("qwen3next.ssm.time_step_rank"), file.integer("qwen3next.ssm.inner_size")
    if inner % num_heads:
        raise file.refusal("qwen3next.ssm.inner_size", f"a multiple of the {num_heads} heads (ssm.time_step_rank)")
    recurrent = [f"blk.{layer}.ssm_out.weight" in file.tensors for layer in range(sizes["num_hidden_layers"])]
    kinds = ["linear_attention" if each else "full_attention" for each in recurrent]
    return {"linear_value_head_dim": inner // num_heads, "layer_types": kinds}


def _norm_eps(file: GgufFile, prefix: str) -> float:
    keys = (f"{prefix}attention.layer_norm_rms_epsilon", f"{prefix}attention.layer_norm_epsilon")
    return file.number(next((key for key in keys if key in file.metadata), keys[0]), 1e-5)


def _query_scalar(file: GgufFile, sizes: dict[str, Any]) -> int:
    """Gemma's largest models scale by the width of a head that would divide the model."""
    if sizes["num_hidden_layers"] == _NUM_LAYERS_OF_GEMMA_27B.get(file.architecture):
        return int(sizes["hidden_size"]) // int(sizes["num_attention_heads"])
    return int(sizes["head_dim"])


def _rope(file: GgufFile, family: Family, prefix: str, sizes: dict[str, Any]) -> dict[str, Any]:
    head_dim, max_position = sizes["head_dim"], sizes["max_position_embeddings"]
    rotated = file.integer(f"{prefix}rope.dimension_count", head_dim)
    if rotated % 2 or rotated > head_dim:
        raise file.refusal(f"{prefix}rope.dimension_count", f"an even number of at most a head's {head_dim} elements")
    values: dict[str, Any] = {"rope_theta": file.number(f"{prefix}rope.freq_base", 10000.0)}
    # Latent attention rotates a part of its own, whole.
    if rotated != head_dim and f"{prefix}attention.kv_lora_rank" not in file.metadata:
        values["partial_rotary_factor"] = rotated / head_dim
    stretch = _stretch(file, prefix, rotated // 2, max_position)
    if not stretch:
        return values
    # Phi-3's config.json has the training length outside the object too, and reads that one.
    original = {key: stretch[key] for key in ("original_max_position_embeddings",) if key in stretch}
    return {**values, **original, "rope_scaling": {**stretch, **family.rope}}


def _stretch(file: GgufFile, prefix: str, num_pairs: int, max_position: int) -> dict[str, Any]:
    """`rope_scaling`. Divisors of the frequencies are tensors: one set (Llama 3), or one for short contexts and one for
    long ones (Phi-3)."""
    original = file.integer(f"{prefix}rope.scaling.original_context_length", max_position)
    factor = file.number(f"{prefix}rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in file.tensors:
        divisors = file.floats_of("rope_freqs.weight", num_pairs)
        # One set for all lengths, so the training length is the longest context.
        return _long_rope(divisors, divisors, original=max_position, attention_factor=1.0)
    if "rope_factors_long.weight" in file.tensors and "rope_factors_short.weight" in file.tensors:
        short, long = (file.floats_of(f"rope_factors_{name}.weight", num_pairs) for name in ("short", "long"))
        attention_factor = file.number(f"{prefix}rope.scaling.attn_factor", 0.0) or None
        return _long_rope(short, long, original=original, attention_factor=attention_factor)
    kind = file.text(f"{prefix}rope.scaling.type", "none")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind not in ("linear", "yarn"):
        raise file.refusal(f"{prefix}rope.scaling.type", "none, linear, yarn, or tensors of factors")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    betas = {name: file.number(f"{prefix}rope.scaling.yarn_{name}", default) for name, default in _BETAS.items()}
    values: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if multiplier := file.number(f"{prefix}rope.scaling.yarn_log_multiplier", 0.0):
        # The converter writes a tenth of mscale_all_dim; published models have the same mscale beside it.
        values |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}
    return {**values, **betas}


_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def _long_rope(
    short: list[float], long: list[float], *, original: int, attention_factor: float | None
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
    }


def _dtype(file: GgufFile) -> str:
    """The float type that holds most numbers of the matrices; bfloat16 for a file of blocks, whose own type is none."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.block.name] = sizes.get(tensor.block.name, 0) + tensor.end - tensor.begin
    return _FLOATS.get(max(sizes, key=sizes.__getitem__), "bfloat16")
