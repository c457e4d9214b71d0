"""`python -m benchmarks.make_models DIR [M160 M600]`: random weights in real shapes, to measure speed with.

M160 is a small Llama, M600 has the shape of Qwen3-0.6B, M1100 that of TinyLlama-1.1B, and moe is a Mixtral of 8 experts
with 0.1 billion active weights. Each is written twice, in float32 and in bfloat16, with the same values (sampled from
seed 0, rounded to bfloat16), so that every dtype computes the same model.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
INITIALIZER_RANGE = 0.02

SHAPES: dict[str, dict[str, Any]] = {
    "M160": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "M600": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "M1100": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "moe": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 1024,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}
SHARED_CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": INITIALIZER_RANGE,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(SHAPES)
    for name in names:
        config = SHARED_CONFIG | SHAPES[name]
        weights = draw_weights(config)
        tokenizer = make_tokenizer(config["vocab_size"])
        for suffix, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            target = folder / f"{name}-{suffix}"
            write_checkpoint(target, config, weights, tokenizer, dtype)
            num_weights = sum(tensor.numel() for tensor in weights.values())
            print(f"{target}: {num_weights / 1e6:.0f} million weights, {dtype}")


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, as in Hugging Face checkpoints; tied embeddings are stored once."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if num_experts := config.get("num_local_experts", 0):
        names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
        layer["block_sparse_moe.gate"] = (num_experts, hidden)
        for index in range(num_experts):
            layer |= {f"block_sparse_moe.experts.{index}.{name}": mlp[part] for name, part in names.items()}
    else:
        layer |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    if config["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    layers = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    table = (config["vocab_size"], hidden)
    ends: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        ends["lm_head.weight"] = table
    return {"model.embed_tokens.weight": table} | layers | ends


def draw_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Norm weights are ones; all others are normal with the usual deviation of an untrained model."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(INITIALIZER_RANGE).bfloat16()
        for name, shape in weight_shapes(config).items()
    }


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """All bytes, three special tokens, and filler tokens that never occur, so that every id has a name."""
    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<filler_{index}>" for index in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
) -> None:
    """Write a folder like `save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    token_ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    files = {
        "config.json": config | {"torch_dtype": str(dtype).removeprefix("torch.")},
        "generation_config.json": token_ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
