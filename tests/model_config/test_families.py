"""What families say as data: config.json as transformers writes it, read into fields and parameter counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from quire.errors import CheckpointError
from quire.layer_spec import ExpertsSpec, LayerSpec
from quire.model_config import ARCHITECTURES, ModelConfig, RopeConfig
from quire.model_config.decoder_layers import decoder_layers


def _longrope(num_pairs: int, share: float) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * num_pairs, "long_factor": [2.0] * num_pairs}
    values = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": share, **factors}
    return {"rope_parameters": values}


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "LlamaForCausalLM",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "Llama with biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}),
    "Mistral-7B": ("MistralForCausalLM", {"num_hidden_layers": 32}),
    "Ministral-8B": (
        "MinistralForCausalLM",
        {"vocab_size": 131072, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
        | {"max_position_embeddings": 32768, "sliding_window": 32768, "rope_theta": 1e8},
    ),
    "Ministral-3-8B": ("Ministral3ForCausalLM", {}),
    "Ministral-3-3B": (
        "Ministral3ForCausalLM",
        {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26, "tie_word_embeddings": True},
    ),
    "Qwen2-0.5B": (
        "Qwen2ForCausalLM",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-8B": ("Qwen3ForCausalLM", {"num_hidden_layers": 36, "num_key_value_heads": 8}),
    "GPT-2": ("GPT2LMHeadModel", {}),
    "Mixtral-8x7B": ("MixtralForCausalLM", {}),
    "stablelm-3b": ("StableLmForCausalLM", {}),
    "stablelm-2-1.6b": (
        "StableLmForCausalLM",
        {
            "vocab_size": 100352,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "use_qkv_bias": True,
        },
    ),
    "stablelm-2-12b": (
        "StableLmForCausalLM",
        {
            "vocab_size": 100352,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "gemma-2b": (
        "GemmaForCausalLM",
        {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "hidden_act": "gelu",
        },
    ),
    "gemma-7b": ("GemmaForCausalLM", {}),
    "gemma-2-2b": ("Gemma2ForCausalLM", {}),
    "gpt-j-6b": ("GPTJForCausalLM", {}),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2MoeForCausalLM",
        {"max_position_embeddings": 8192, "max_window_layers": 21, "sliding_window": 32768},
    ),
    "Qwen2-57B-A14B": (
        "Qwen2MoeForCausalLM",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True, "max_position_embeddings": 40960},
    ),
    "Qwen3-235B-A22B": (
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "head_dim": 128,
            "moe_intermediate_size": 1536,
            "norm_topk_prob": True,
        },
    ),
    "OLMoE-1B-7B": ("OlmoeForCausalLM", {"intermediate_size": 1024}),
    "granite-3.1-1b-a400m": (
        "GraniteMoeForCausalLM",
        {
            "vocab_size": 49155,
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 6.0,
        },
    ),
    "Phi-3.5-MoE": ("PhimoeForCausalLM", {"attention_bias": True, "lm_head_bias": True}),
    "GLM-4.5-Air": ("Glm4MoeForCausalLM", {"head_dim": 128, "attention_bias": True}),
    "GLM-4.5": (
        "Glm4MoeForCausalLM",
        {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "num_hidden_layers": 92,
            "head_dim": 128,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "gpt-neox-20b": ("GPTNeoXForCausalLM", {"hidden_act": "gelu_fast"}),
    "pythia-1.4b": (
        "GPTNeoXForCausalLM",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "Phi-3-mini-4k": ("Phi3ForCausalLM", {"sliding_window": 2047}),
    "Phi-3-medium-128k": (
        "Phi3ForCausalLM",
        {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40}
        | {"num_key_value_heads": 10, "max_position_embeddings": 131072, "sliding_window": 131072}
        | _longrope(64, 1.0),
    ),
    "Phi-4": (
        "Phi3ForCausalLM",
        {"vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40}
        | {"num_attention_heads": 40, "num_key_value_heads": 10, "max_position_embeddings": 16384}
        | {"original_max_position_embeddings": 16384, "rope_theta": 250000.0},
    ),
    "Phi-4-mini": (
        "Phi3ForCausalLM",
        {"vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True}
        | {"max_position_embeddings": 131072, "sliding_window": 262144, "pad_token_id": 199999}
        | _longrope(48, 0.75),
    ),
    "EXAONE-4.0-32B": (
        "Exaone4ForCausalLM",
        {"hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 64, "num_attention_heads": 40}
        | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072},
    ),
    "EXAONE-4.0-1.2B": (
        "Exaone4ForCausalLM",
        {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 30, "num_key_value_heads": 8}
        | {"head_dim": 64, "sliding_window": None, "layer_types": ["full_attention"] * 30, "tie_word_embeddings": True},
    ),
    "glm-4-9b-chat": ("GlmForCausalLM", {}),
    "GLM-4-9B-0414": ("Glm4ForCausalLM", {"attention_bias": False, "max_position_embeddings": 32768}),
    "GLM-4-32B-0414": (
        "Glm4ForCausalLM",
        {"hidden_size": 6144, "intermediate_size": 23040, "num_hidden_layers": 61, "num_attention_heads": 48}
        | {"attention_bias": False, "max_position_embeddings": 32768},
    ),
    "starcoder2-3b": (
        "Starcoder2ForCausalLM",
        {"num_hidden_layers": 30, "max_position_embeddings": 16384, "sliding_window": 4096},
    ),
    "starcoder2-7b": (
        "Starcoder2ForCausalLM",
        {"hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32}
        | {"num_attention_heads": 36, "num_key_value_heads": 4},
    ),
    "starcoder2-15b": (
        "Starcoder2ForCausalLM",
        {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 40}
        | {"num_attention_heads": 48, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "starcoder": (
        "GPTBigCodeForCausalLM",
        {"vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576}
        | {"n_positions": 8192, "activation_function": "gelu"},
    ),
    "santacoder with a KV head for each query head": (
        "GPTBigCodeForCausalLM",
        {"vocab_size": 49280, "n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 2048, "multi_query": False},
    ),
    "granite-3.0-8b": (
        "GraniteForCausalLM",
        {
            "vocab_size": 49155,
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 16.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite-3.0-2b": (
        "GraniteForCausalLM",
        {"vocab_size": 49155, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40}
        | {"num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "SmolLM3-3B": ("SmolLM3ForCausalLM", {"max_position_embeddings": 65536}),
    "OLMo-2-1124-7B": ("Olmo2ForCausalLM", {"vocab_size": 100352, "max_position_embeddings": 4096}),
    "OLMo-2-0425-1B": (
        "Olmo2ForCausalLM",
        {"vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "rope_theta": 500000, "max_position_embeddings": 4096},
    ),
    "OLMo-2-0325-32B": (
        "Olmo2ForCausalLM",
        {"vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
        | {"num_attention_heads": 40, "num_key_value_heads": 8, "rope_theta": 500000, "max_position_embeddings": 4096},
    ),
    "c4ai-command-r-v01": ("CohereForCausalLM", {"max_position_embeddings": 131072, "rope_theta": 8000000.0}),
    "c4ai-command-r-plus": (
        "CohereForCausalLM",
        {"hidden_size": 12288, "intermediate_size": 33792, "num_hidden_layers": 64, "num_attention_heads": 96}
        | {"num_key_value_heads": 8, "use_qk_norm": True, "logit_scale": 0.8333333333333334},
    ),
    "aya-expanse-8b": (
        "CohereForCausalLM",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "logit_scale": 0.125, "rope_theta": 10000},
    ),
    "c4ai-command-a-03-2025": (
        "Cohere2ForCausalLM",
        {"hidden_size": 12288, "intermediate_size": 36864, "num_hidden_layers": 64, "num_attention_heads": 96}
        | {"num_key_value_heads": 8, "logit_scale": 0.25, "rope_theta": 50000},
    ),
    "c4ai-command-r7b-12-2024": (
        "Cohere2ForCausalLM",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "logit_scale": 0.25, "rope_theta": 50000, "sliding_window_pattern": 4},
    ),
    "gemma-3-1b": (
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "sliding_window": 512,
        },
    ),
    "gemma-3-270m": (
        "Gemma3ForCausalLM",
        {"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512, "max_position_embeddings": 32768},
    ),
    "gemma-3-4b": (
        "Gemma3ForCausalLM",
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024},
    ),
    "gemma-3-27b": (
        "Gemma3ForCausalLM",
        {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    ),
    "opt-125m": ("OPTForCausalLM", {}),
    "opt-350m": (
        "OPTForCausalLM",
        {
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 512,
        },
    ),
    "OPT without biases": ("OPTForCausalLM", {"num_hidden_layers": 2, "enable_bias": False}),
    "OPT fine-tuned early": ("OPTForCausalLM", {"num_hidden_layers": 2, "_remove_final_layer_norm": True}),
    "phi-1_5": ("PhiForCausalLM", {}),
    "phi-2": (
        "PhiForCausalLM",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "partial_rotary_factor": 0.4,
        },
    ),
    "phi with norms of heads": ("PhiForCausalLM", {"num_hidden_layers": 2, "qk_layernorm": True}),
    "bloom-560m": ("BloomForCausalLM", {"hidden_size": 1024, "n_layer": 24, "n_head": 16}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 14336, "n_layer": 70, "n_head": 112}),
    "falcon-7b": ("FalconForCausalLM", {}),
    "falcon-40b": (
        "FalconForCausalLM",
        {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
        | {"new_decoder_architecture": True},
    ),
    "falcon-11b": (
        "FalconForCausalLM",
        {"hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32, "num_kv_heads": 8}
        | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "max_position_embeddings": 8192}
        | {"rope_theta": 500042.0, "tie_word_embeddings": False},
    ),
    "falcon-rw-1b": (
        "FalconForCausalLM",
        {"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "alibi": True}
        | {"bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "mpt-7b": (
        "MptForCausalLM",
        {"vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32, "max_seq_len": 2048},
    ),
    "mpt-7b-storywriter": (
        "MptForCausalLM",
        {"vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32, "max_seq_len": 65536}
        | {"attn_config": {"alibi_bias_max": 16, "clip_qkv": 6.0, "attn_impl": "triton"}},
    ),
    "mpt-30b": (
        "MptForCausalLM",
        {"vocab_size": 50432, "d_model": 7168, "n_layers": 48, "n_heads": 64, "max_seq_len": 8192},
    ),
}
"""Name → architecture, and what its config changes of transformers' defaults."""
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
    "Ministral3ForCausalLM": "ministral3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
    "MixtralForCausalLM": "mixtral",
    "StableLmForCausalLM": "stablelm",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "GPTJForCausalLM": "gptj",
    "Glm4MoeForCausalLM": "glm4_moe",
    "PhimoeForCausalLM": "phimoe",
    "GraniteMoeForCausalLM": "granitemoe",
    "OlmoeForCausalLM": "olmoe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Phi3ForCausalLM": "phi3",
    "Exaone4ForCausalLM": "exaone4",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm4",
    "Starcoder2ForCausalLM": "starcoder2",
    "GPTBigCodeForCausalLM": "gpt_bigcode",
    "Gemma3ForCausalLM": "gemma3_text",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "Olmo2ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "PhiForCausalLM": "phi",
    "OPTForCausalLM": "opt",
    "BloomForCausalLM": "bloom",
    "FalconForCausalLM": "falcon",
    "MptForCausalLM": "mpt",
}


def write(folder: Path, name: str, **changes: Any) -> PretrainedConfig:
    """Save the config of a published model as transformers does."""
    architecture, options = PUBLISHED[name]
    config = AutoConfig.for_model(MODEL_TYPES[architecture], **options, **changes)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    config = write(tmp_path, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = ModelConfig.from_folder(tmp_path).spec
    assert spec.num_parameters == model.num_parameters()
    vectors = sum(each.numel() for name, each in model.named_parameters() if each.dim() == 1 or "norm" in name)
    assert spec.num_vector_parameters == vectors


def test_mixtral_is_read(tmp_path: Path) -> None:
    write(tmp_path, "Mixtral-8x7B")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (8, 2, 14336)
    assert config.norm_topk
    assert config.shared_expert_intermediate_size == 0
    assert config.rope is not None
    assert config.rope.theta == 1e6
    assert config.layer_windows == (0,) * 32
    spec = config.spec
    # As its announcement says: 46.7B parameters, 12.9B of them used for a token.
    assert (spec.num_parameters, spec.num_active_parameters) == (46_702_792_704, 12_879_925_248)
    assert isinstance(spec.layers[0].mlp, ExpertsSpec)
    assert [linear.name for linear, _ in spec.layers[0].matrices] == [
        *("qkv", "o", "router"),
        *("expert.gate_up", "expert.down"),
    ]


def test_qwen2_moe_is_read(tmp_path: Path) -> None:
    write(tmp_path, "Qwen1.5-MoE-A2.7B")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (60, 4, 1408)
    assert (config.shared_expert_intermediate_size, config.shared_expert_gate, config.norm_topk) == (5632, True, False)
    assert (config.qkv_bias, config.o_bias, config.dense_layers) == (True, False, frozenset())
    assert config.layer_windows == (0,) * 24
    # As its model card says: 14.3B parameters, 2.7B of them used for a token.
    assert (config.spec.num_parameters, config.spec.num_active_parameters) == (14_315_784_192, 2_689_173_504)
    write(tmp_path, "Qwen1.5-MoE-A2.7B", decoder_sparse_step=3, mlp_only_layers=[2, 3], num_hidden_layers=6)
    assert ModelConfig.from_folder(tmp_path).dense_layers == {0, 1, 2, 3, 4}


def test_olmoe_is_read(tmp_path: Path) -> None:
    write(tmp_path, "OLMoE-1B-7B")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (64, 8, 1024)
    assert (config.qk_norm, config.qk_norm_joint, config.norm_topk) == (True, True, False)
    assert (round(config.spec.num_parameters / 1e9, 1), round(config.spec.num_active_parameters / 1e9, 1)) == (6.9, 1.3)


def test_granite_moe_is_read(tmp_path: Path) -> None:
    write(tmp_path, "granite-3.1-1b-a400m")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (32, 8, 512)
    assert (config.router.kind, config.residual_multiplier, config.attention_scale) == ("topk_softmax", 0.22, 1 / 64)
    assert (round(config.spec.num_parameters / 1e9, 1), round(config.spec.num_active_parameters / 1e9, 1)) == (1.3, 0.4)


def test_phi_3_5_moe_is_read(tmp_path: Path) -> None:
    write(tmp_path, "Phi-3.5-MoE")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (16, 2, 6400)
    assert (config.norm, config.norm_bias, config.qkv_bias, config.o_bias, config.head_bias) == (
        "layer_norm",
        *(True,) * 4,
    )
    assert (config.router.kind, config.router.jitter) == ("sparse_mixer", 0.01)
    # As its model card says: 16x3.8B, 42B parameters, 6.6B of them used for a token.
    assert (round(config.spec.num_parameters / 1e9), round(config.spec.num_active_parameters / 1e9, 1)) == (42, 6.6)


def test_glm_4_5_is_read(tmp_path: Path) -> None:
    write(tmp_path, "GLM-4.5")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (160, 8, 1536)
    assert (config.shared_expert_intermediate_size, config.shared_expert_gate, config.norm_topk) == (1536, False, True)
    assert (config.router.kind, config.router.scale, config.router.num_groups) == ("grouped_sigmoid", 2.5, 1)
    assert (config.dense_layers, config.qk_norm, config.qkv_bias, config.o_bias) == ({0, 1, 2}, True, True, False)
    assert config.rope is not None
    assert (config.rope.rotary_dim(config.head_dim), config.rope.layout) == (64, "half")
    # As its model card says, without the layer that predicts the token after the next: 355B, 32B used for a token.
    assert (round(config.spec.num_parameters / 1e9), round(config.spec.num_active_parameters / 1e9)) == (353, 34)


def test_qwen3_moe_is_read(tmp_path: Path) -> None:
    write(tmp_path, "Qwen3-30B-A3B")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (128, 8, 768)
    assert (config.qk_norm, config.norm_topk, config.shared_expert_intermediate_size) == (True, True, 0)
    # As its model card says: 30.5B parameters, 3.3B of them used for a token.
    assert (round(config.spec.num_parameters / 1e8), config.spec.num_active_parameters // 10**8) == (305, 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; supported: at most the number of experts 8"),
        ({"num_local_experts": -1}, "num_local_experts is -1; supported: an integer of at least 1"),
        ({"hidden_act": "mish"}, 'hidden_act is "mish"; supported: silu, .*relu2$'),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing; supported: an integer of at least 1"),
    ],
)
def test_experts_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "Mixtral-8x7B")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)


def test_stablelm_is_read(tmp_path: Path) -> None:
    write(tmp_path, "stablelm-2-12b")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.norm, config.norm_bias, config.norm_eps) == ("layer_norm", True, 1e-5)
    assert (config.qk_norm, config.qk_norm_per_head, config.parallel_residual) == (True, True, True)
    assert (config.qkv_bias, config.o_bias) == (False, False)
    assert config.rope is not None
    assert (config.rope.rotary_dim(config.head_dim), config.rope.layout) == (40, "half")
    write(tmp_path, "stablelm-2-1.6b")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.parallel_residual) == (True, False, False, False)
    # Versions before 5 wrote rope_theta and the share that is rotated beside each other.
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    path.write_text(json.dumps(values | {"rope_theta": 5000, "partial_rotary_factor": 0.5}))
    rope = ModelConfig.from_folder(tmp_path).rope
    assert rope is not None
    assert (rope.theta, rope.partial_rotary_factor) == (5000, 0.5)


def test_gemma_2_is_read(tmp_path: Path) -> None:
    write(tmp_path, "gemma-2-2b", num_hidden_layers=4, sliding_window=9, query_pre_attn_scalar=144)
    config = ModelConfig.from_folder(tmp_path)
    assert config.activation == "gelu_tanh"
    assert (config.norm, config.norm_bias, config.norm_unit_offset, config.post_norms) == (
        "rms_norm",
        False,
        True,
        True,
    )
    assert config.attention_scale == 1 / 12
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 30.0)
    assert config.embedding_multiplier == 2304**0.5
    assert config.tie_word_embeddings
    assert config.layer_windows == (9, 0, 9, 0)
    assert [layer.attention.kv.kind for layer in config.spec.layers] == ["window", "full"] * 2
    assert config.spec.layers[0].attention.kv.window == 9
    # Older files leave the types of layers to the code, and may switch a cap off.
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["layer_types"]
    path.write_text(json.dumps(values | {"attn_logit_softcapping": None}))
    assert ModelConfig.from_folder(tmp_path).layer_windows == (9, 0, 9, 0)
    assert ModelConfig.from_folder(tmp_path).attention_softcap == 0
    path.write_text(json.dumps(values | {"use_bidirectional_attention": True}))
    with pytest.raises(CheckpointError, match="use_bidirectional_attention is true"):
        ModelConfig.from_folder(tmp_path)


def test_starcoder2_is_read(tmp_path: Path) -> None:
    write(tmp_path, "starcoder2-3b")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.norm, config.norm_bias, config.norm_eps) == ("layer_norm", True, 1e-5)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.gated_mlp) == (True, True, True, False)
    assert config.activation == "gelu_tanh"
    assert config.layer_windows == (4096,) * 30
    assert config.spec.num_parameters == 3_030_371_328
    write(tmp_path, "starcoder2-7b")
    assert ModelConfig.from_folder(tmp_path).layer_windows == (0,) * 32


def test_gpt_bigcode_is_read(tmp_path: Path) -> None:
    write(tmp_path, "starcoder")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.num_qkv_heads, config.head_dim) == (48, 1, 50, 128)
    assert (config.activation, config.rope, config.tie_word_embeddings) == ("gelu", None, True)
    write(tmp_path, "santacoder with a KV head for each query head")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.activation) == (16, 16, "gelu_tanh")


def test_gemma_3_is_read(tmp_path: Path) -> None:
    write(tmp_path, "gemma-3-27b")
    config = ModelConfig.from_folder(tmp_path)
    windows = ((1024,) * 5 + (0,)) * 10 + (1024, 1024)
    stretched = RopeConfig(theta=1e6, rope_type="linear", factor=8.0, original_max_position=131072)
    local = RopeConfig(theta=1e4, original_max_position=131072)
    assert config.layer_windows == windows
    assert config.rope == stretched
    assert config.layer_ropes == tuple(local if window else stretched for window in windows)
    assert config.context_length == 131072
    assert (config.attention_scale, config.attention_softcap, config.logits_softcap) == (168**-0.5, 0.0, 0.0)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    # Versions before 5 wrote the two bases apart, one scaling that is of the layers without window, and a pattern.
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        values.pop(name, None)
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    old |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    for change in (old, {"rope_scaling": {"factor": 8.0, "type": "linear"}}):
        path.write_text(json.dumps(values | change))
        assert ModelConfig.from_folder(tmp_path) == config
    # A file with both means both.
    bases = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    scaling = {"rope_type": "linear", "factor": 8.0}
    path.write_text(json.dumps(values | {"rope_parameters": bases, "rope_scaling": scaling}))
    assert ModelConfig.from_folder(tmp_path) == config
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["full_attention"] == {**scaling, "rope_theta": 1e6}
    # As published with a vision tower: what the text model's part leaves out has Gemma's values.
    text = {key: values[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window")}
    text |= {"model_type": "gemma3_text", "query_pre_attn_scalar": 168, "eos_token_id": 1} | old
    text |= {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": text}
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    tower |= {"image_size": 896, "patch_size": 14, "model_type": "siglip_vision_model", "vision_use_head": False}
    path.write_text(json.dumps(whole | {"torch_dtype": "bfloat16", "vision_config": tower}))
    found = ModelConfig.from_folder(tmp_path)
    assert found.vision is not None
    assert (found.tokens_of_whole_images, found.vision.merge, found.vision.marker_token_id) == (256, 4, 255999)
    changes = {"architecture": whole["architectures"][0], "checkpoint_dtype": "bfloat16", "eos_token_ids": (1, 106)}
    assert replace(found, vision=None) == replace(config, bos_token_id=None, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; supported: false"),
        ({"sliding_window": None}, "sliding_window is missing; supported: a number of positions, since layers with"),
        ({"rope_parameters": {"rope_type": "default"}}, "supported: an object for each of full_attention, sliding_att"),
        ({"rope_parameters": {"chunked": {}}}, "supported: an object for each of full_attention, sliding_attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
            "rope_parameters.full_attention.factor is missing; supported: a positive number",
        ),
        ({"rope_parameters": 5}, "rope_parameters is 5; supported: an object"),
        ({"rope_scaling": [8]}, r"rope_scaling is \[8\]; supported: an object"),
        ({"rope_parameters": {"full_attention": 5}}, "rope_parameters.full_attention is 5; supported: an object"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "text_config is missing; supported: an object"),
    ],
)
def test_gemma_3_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "gemma-3-1b")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)


def test_granite_is_read(tmp_path: Path) -> None:
    write(tmp_path, "granite-3.0-8b")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_multiplier) == (12.0, 0.22, 1 / 16)
    assert config.attention_scale == 1 / 128
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    names = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in names}))
    config = ModelConfig.from_folder(tmp_path)
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_multiplier) == (1.0, 1.0, 1.0)
    assert config.attention_scale == 1.0
    for name in names:
        path.write_text(json.dumps(values | {name: 0}))
        with pytest.raises(CheckpointError, match=f"{name} is 0; supported: a positive number"):
            ModelConfig.from_folder(tmp_path)


def test_smollm3_is_read(tmp_path: Path) -> None:
    write(tmp_path, "SmolLM3-3B", rope_theta=5e6)
    config = ModelConfig.from_folder(tmp_path)
    assert config.spec.num_parameters == 3_075_098_624  # as its card says
    assert config.layer_windows == (0,) * 36
    assert config.rope == RopeConfig(theta=5e6, original_max_position=65536)
    assert config.layer_ropes == (*[config.rope] * 3, None) * 9
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for change in ({"no_rope_layers": None}, {"no_rope_layers": [True, 1, 1, 0] * 10}):
        path.write_text(json.dumps(values | change))
        assert ModelConfig.from_folder(tmp_path) == config
    path.write_text(json.dumps(values | {"no_rope_layers": [1] * 36}))
    assert ModelConfig.from_folder(tmp_path).layer_ropes == ()
    changes = {"no_rope_layers": None, "layer_types": None, "use_sliding_window": True, "sliding_window": 9}
    path.write_text(json.dumps(values | changes))
    assert ModelConfig.from_folder(tmp_path).layer_windows == (0, 0, 0, 9) * 9
    for wrong in ([1] * 35, [2] * 36, 1):
        path.write_text(json.dumps(values | {"no_rope_layers": wrong}))
        with pytest.raises(CheckpointError, match=r"no_rope_layers is .*; supported: 36 times 0 or 1"):
            ModelConfig.from_folder(tmp_path)
    path.write_text(json.dumps(values | {"no_rope_layers": None, "no_rope_layer_interval": 0}))
    with pytest.raises(CheckpointError, match="no_rope_layer_interval is 0; supported: an integer of at least 1"):
        ModelConfig.from_folder(tmp_path)


def test_olmo_2_is_read(tmp_path: Path) -> None:
    write(tmp_path, "OLMo-2-0325-32B")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.pre_norms, config.post_norms, config.qk_norm, config.qk_norm_joint) == (False, True, True, True)
    assert (config.norm_eps, config.context_length) == (1e-5, 4096)
    assert [(each.name, each.size) for each in config.spec.layers[0].vectors] == [
        *(("attention_post_norm.weight", 5120), ("mlp_post_norm.weight", 5120)),
        *(("q_norm.weight", 5120), ("k_norm.weight", 1024)),
    ]


def test_cohere_is_read(tmp_path: Path) -> None:
    write(tmp_path, "c4ai-command-r-plus")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.norm, config.norm_bias, config.norm_eps) == ("layer_norm", False, 1e-5)
    assert (config.qk_norm, config.qk_norm_per_head, config.parallel_residual) == (True, True, True)
    assert (config.logits_multiplier, config.tie_word_embeddings) == (0.8333333333333334, True)
    assert config.layer_ropes == ()
    assert config.rope is not None
    assert (config.rope.layout, config.rope.theta) == ("interleaved", 5e5)
    write(tmp_path, "c4ai-command-r7b-12-2024")
    config = ModelConfig.from_folder(tmp_path)
    rope = RopeConfig(theta=50000.0, layout="interleaved", original_max_position=8192)
    assert config.rope == rope
    assert config.layer_windows == (4096, 4096, 4096, 0) * 8
    assert config.layer_ropes == (rope, rope, rope, None) * 8
    # Files of version 4 have the pattern instead of the types of layers.
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["layer_types"]
    path.write_text(json.dumps(values))
    assert ModelConfig.from_folder(tmp_path) == config
    for change in ({"use_qk_norm": True}, {"use_parallel_block": False}, {"use_gated_activation": False}):
        path.write_text(json.dumps(values | change))
        ((key, value),) = change.items()
        with pytest.raises(CheckpointError, match=f"{key} is {json.dumps(value)}; supported: {json.dumps(not value)}"):
            ModelConfig.from_folder(tmp_path)


def test_llama_s_fields_are_the_defaults(tmp_path: Path) -> None:
    write(tmp_path, "Llama-3.1-8B")
    config = ModelConfig.from_folder(tmp_path)
    assert config.attention_scale == 128**-0.5
    names = ("norm", "norm_unit_offset", "post_norms", "parallel_residual", "num_experts", "expert_intermediate_size")
    assert [getattr(config, name) for name in names] == ["rms_norm", False, False, False, 0, 0]
    assert (config.attention_softcap, config.logits_softcap, config.embedding_multiplier) == (0.0, 0.0, 1.0)
    assert (config.residual_multiplier, config.logits_multiplier, config.layer_ropes) == (1.0, 1.0, ())


def two_dense_layers_first(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Layers of a made-up family: the first two have an MLP, the others experts."""
    dense = replace(config, num_experts=0)
    return decoder_layers(dense)[:2] + decoder_layers(config)[2:]


def test_a_row_can_name_its_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ARCHITECTURES["MixtralForCausalLM"], layers=f"{__name__}:two_dense_layers_first")
    monkeypatch.setitem(ARCHITECTURES, "ToyForCausalLM", row)
    write(tmp_path, "Mixtral-8x7B", num_hidden_layers=5)
    config = ModelConfig.from_folder(tmp_path)
    toy = replace(config, architecture="ToyForCausalLM")
    assert [layer.experts is None for layer in toy.spec.layers] == [True, True, False, False, False]
    fewer = 2 * (7 * 3 * 4096 * 14336 + 8 * 4096)  # the other experts, and the router
    assert config.spec.num_parameters - toy.spec.num_parameters == fewer
