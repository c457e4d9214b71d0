"""`python -m benchmarks.peers.write_gguf CHECKPOINT FILE`: a model of `benchmarks.make_models` for llama.cpp, float32.

llama.cpp's own converter takes only tokenizers that it knows by name. The tensors are the same. Needs the packages gguf
and safetensors.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "mixtral": "llama"}
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
"""Matrices of one expert, which llama.cpp stacks."""


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    config = json.loads((source / "config.json").read_text())
    writer: Any = gguf.GGUFWriter(target, ARCHITECTURES[config["model_type"]])
    add_shape(writer, source.name, config)
    add_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()), config)
    stacks: dict[str, dict[int, Any]] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".experts." in name:
            scope, _, rest = name.partition(".block_sparse_moe.experts.")
            index, part, _ = rest.split(".")
            stacks.setdefault(f"blk.{scope.rsplit('.', 1)[1]}.{EXPERTS[part]}.weight", {})[int(index)] = tensor
        else:
            writer.add_tensor(gguf_name(name), in_gguf_order(name, tensor, config))
    for name, experts in stacks.items():
        writer.add_tensor(name, np.stack([experts[index] for index in sorted(experts)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: Any, name: str, config: dict[str, Any]) -> None:
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    places = {place: token for token, place in (tokenizer["model"]["vocab"] | special).items()}
    tokens = [places.get(place, f"<unused{place}>") for place in range(config["vocab_size"])]
    kinds = gguf.TokenType
    merges = tokenizer["model"]["merges"]
    if not merges:  # llama.cpp needs at least one, and Quire its token. It changes nothing: prompts are token ids.
        merges = [tokens[3:5]]
        tokens[-1] = "".join(tokens[3:5])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TENSORS:
        return f"{TENSORS[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{TENSORS[part]}.weight"


def in_gguf_order(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    """Permute rows: llama.cpp rotates neighbouring pairs, checkpoints rotate the two halves of a head."""
    if ARCHITECTURES[config["model_type"]] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    halves = tensor.reshape(-1, 2, config["head_dim"] // 2, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


if __name__ == "__main__":
    main()
