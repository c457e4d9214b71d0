"""Small Hugging Face checkpoints with random weights, written by transformers, for the tests of models and engine.

`make_checkpoint(folder, family)` writes config.json, generation_config.json, safetensors and a byte-level tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.apertus import ApertusConfig, ApertusForCausalLM
from transformers.models.arcee import ArceeConfig, ArceeForCausalLM
from transformers.models.bamba import BambaConfig, BambaForCausalLM
from transformers.models.bloom import BloomConfig, BloomForCausalLM
from transformers.models.cohere import CohereConfig, CohereForCausalLM
from transformers.models.cohere2 import Cohere2Config, Cohere2ForCausalLM
from transformers.models.cwm import CwmConfig, CwmForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.dots1 import Dots1Config, Dots1ForCausalLM
from transformers.models.ernie4_5 import Ernie4_5Config, Ernie4_5ForCausalLM
from transformers.models.ernie4_5_moe import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.models.exaone4 import Exaone4Config, Exaone4ForCausalLM
from transformers.models.exaone_moe import ExaoneMoeConfig, ExaoneMoeForCausalLM
from transformers.models.falcon import FalconConfig, FalconForCausalLM
from transformers.models.gemma import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.glm import GlmConfig, GlmForCausalLM
from transformers.models.glm4 import Glm4Config, Glm4ForCausalLM
from transformers.models.glm4_moe import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt_bigcode import GPTBigCodeConfig, GPTBigCodeForCausalLM
from transformers.models.gpt_neox import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_oss import GptOssConfig, GptOssForCausalLM
from transformers.models.gptj import GPTJConfig, GPTJForCausalLM
from transformers.models.granite import GraniteConfig, GraniteForCausalLM
from transformers.models.granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM
from transformers.models.granitemoehybrid import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
from transformers.models.helium import HeliumConfig, HeliumForCausalLM
from transformers.models.hunyuan_v1_dense import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM
from transformers.models.hunyuan_v1_moe import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM
from transformers.models.internlm3 import InternLM3Config
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.ministral import MinistralConfig, MinistralForCausalLM
from transformers.models.ministral3 import Ministral3Config, Ministral3ForCausalLM
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.mpt import MptConfig, MptForCausalLM
from transformers.models.olmo2 import Olmo2Config, Olmo2ForCausalLM
from transformers.models.olmo3 import Olmo3Config, Olmo3ForCausalLM
from transformers.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from transformers.models.opt import OPTConfig, OPTForCausalLM
from transformers.models.phi import PhiConfig, PhiForCausalLM
from transformers.models.phi3 import Phi3Config, Phi3ForCausalLM
from transformers.models.phimoe import PhimoeConfig, PhimoeForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.seed_oss import SeedOssConfig, SeedOssForCausalLM
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM
from transformers.models.stablelm import StableLmConfig, StableLmForCausalLM
from transformers.models.starcoder2 import Starcoder2Config, Starcoder2ForCausalLM
from transformers.models.youtu import YoutuConfig, YoutuForCausalLM
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

VOCAB_SIZE = 260
BOS_TOKEN_ID, EOS_TOKEN_ID = 257, 258

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 256,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
}


_BLOOM: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "n_layer": 3,
    "n_head": 4,
    "seq_length": 256,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
}
_MPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "n_layers": 3,
    "n_heads": 4,
    "max_seq_len": 256,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
}
_STABLELM = {key: value for key, value in _DECODER.items() if key != "head_dim"}
_GLM = {**_DECODER, "pad_token_id": 256}
_PHI3 = {**_STABLELM, "pad_token_id": 256}
_GPT_NEOX = {key: value for key, value in _STABLELM.items() if key != "num_key_value_heads"}

_MOE: dict[str, Any] = {**_DECODER, "moe_intermediate_size": 48, "num_experts_per_tok": 2}

_ERNIE_MOE = {key: value for key, value in _MOE.items() if key not in ("head_dim", "num_experts_per_tok")}

_LATENT: dict[str, Any] = {
    **{key: value for key, value in _DECODER.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
}
_DEEPSEEK: dict[str, Any] = {
    **_LATENT,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}

_DELTA_NET: dict[str, Any] = {
    **_DECODER,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
}
_SHARED_EXPERT: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
}
_GRANITE_HYBRID: dict[str, Any] = {
    **{key: value for key, value in _DECODER.items() if key != "head_dim"},
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_d_state": 12,
    "mamba_expand": 2,
    "num_local_experts": 4,
    "shared_intermediate_size": 40,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.7,
}


_OPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.12,
    "pad_token_id": BOS_TOKEN_ID - 1,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
}

LAYER_KINDS = [
    "llama-bias",
    "qwen3",
    "gpt2",
    "stablelm-parallel",
    "gemma2",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "olmoe",
    "granite-moe",
    "phimoe",
    "glm4-moe",
    "ernie4.5-moe",
    "gpt-oss",
    "deepseek-v2",
    "deepseek-v3",
    "gptj",
    "phi3",
    "exaone4",
    "glm4",
    "starcoder2",
    "gpt-bigcode",
    "gpt-neox",
    "bloom",
    "mpt-clipped",
    "falcon",
    "falcon-new",
    "falcon-rw",
    "phi-norms",
    "opt-350m",
]
"""Of FAMILIES, a checkpoint for every way of storing and building a layer."""


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


_BAMBA: dict[str, Any] = {
    **_DECODER,
    "num_hidden_layers": 4,
    "attn_layer_indices": [2],
    "mamba_n_heads": 8,
    "mamba_d_state": 12,
    "mamba_n_groups": 2,
}
FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _DECODER),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {**_DECODER, "attention_bias": True, "mlp_bias": True}),
    "llama-rope-linear": (LlamaConfig, LlamaForCausalLM, {**_DECODER, **_rope("linear", factor=4.0)}),
    "llama-rope-dynamic": (LlamaConfig, LlamaForCausalLM, {**_DECODER, **_rope("dynamic", factor=4.0)}),
    "llama-rope-llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            **_DECODER,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "llama-rope-yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        {**_DECODER, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {**_DECODER, "sliding_window": 24}),
    "ministral": (
        MinistralConfig,
        MinistralForCausalLM,
        {**_DECODER, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "ministral3": (
        Ministral3Config,
        Ministral3ForCausalLM,
        {
            **_DECODER,
            "pad_token_id": 256,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.5,
            ),
        },
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            **_DECODER,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_DECODER, "tie_word_embeddings": True}),
    "stablelm": (StableLmConfig, StableLmForCausalLM, _STABLELM),
    "stablelm-parallel": (
        StableLmConfig,
        StableLmForCausalLM,
        {**_STABLELM, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "gemma": (GemmaConfig, GemmaForCausalLM, _DECODER),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        # The soft-caps are as low as the scores and logits of a small model, so that they bend them.
        {
            **_DECODER,
            "sliding_window": 24,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            **_DECODER,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            **_DECODER,
            "embedding_multiplier": 7.3,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.15,
            "logits_scaling": 1.7,
        },
    ),
    "smollm3": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {
            **{key: value for key, value in _DECODER.items() if key != "head_dim"},
            "no_rope_layer_interval": 2,
            "pad_token_id": None,
        },
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, _DECODER),
    "cohere": (CohereConfig, CohereForCausalLM, {**_STABLELM, "logit_scale": 0.3}),
    "cohere-qk-norm": (CohereConfig, CohereForCausalLM, {**_STABLELM, "use_qk_norm": True}),
    "cohere2": (
        Cohere2Config,
        Cohere2ForCausalLM,
        {
            **_STABLELM,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # The first layer is dense.
    "qwen2-moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {**_MOE, "num_experts": 6, "shared_expert_intermediate_size": 80, "mlp_only_layers": [0]},
    ),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**_MOE, "num_experts": 6, "norm_topk_prob": True, "mlp_only_layers": [2]},
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {**_PHI3, "sliding_window": 24}),
    "phi3-longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            **_PHI3,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 240,
            **_rope(
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                long_factor=[1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
            ),
        },
    ),
    "seed-oss": (SeedOssConfig, SeedOssForCausalLM, _DECODER),
    "ernie4.5-moe": (
        Ernie4_5_MoeConfig,
        Ernie4_5_MoeForCausalLM,
        {**_ERNIE_MOE, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1},
    ),
    "ernie4.5": (Ernie4_5Config, Ernie4_5ForCausalLM, {**_DECODER, "use_bias": True}),
    "helium": (HeliumConfig, HeliumForCausalLM, {**_DECODER, "head_dim": 16}),
    "cwm": (
        CwmConfig,
        CwmForCausalLM,
        {
            **_DECODER,
            "sliding_window": 24,
            **_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        },
    ),
    "olmo3": (
        Olmo3Config,
        Olmo3ForCausalLM,
        {
            **_STABLELM,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "arcee": (ArceeConfig, ArceeForCausalLM, {**_DECODER, "mlp_bias": True}),
    "apertus": (
        ApertusConfig,
        ApertusForCausalLM,
        {
            **_STABLELM,
            **_rope(
                "llama3", factor=4.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0
            ),
        },
    ),
    "hunyuan": (
        HunYuanDenseV1Config,
        HunYuanDenseV1ForCausalLM,
        {**_DECODER, **_rope("dynamic", alpha=8.0, factor=1.0)},
    ),
    "hunyuan-moe": (HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM, {**_DECODER, "num_experts": 4, "moe_topk": [2, 2, 2]}),
    "exaone-moe": (
        ExaoneMoeConfig,
        ExaoneMoeForCausalLM,
        {**_MOE, "num_hidden_layers": 4, "num_experts": 8, "sliding_window": 24},
    ),
    "exaone4": (Exaone4Config, Exaone4ForCausalLM, {**_DECODER, "num_hidden_layers": 4, "sliding_window": 24}),
    "internlm3": (InternLM3Config, LlamaForCausalLM, _DECODER),
    "glm": (GlmConfig, GlmForCausalLM, _GLM),
    "glm4": (Glm4Config, Glm4ForCausalLM, _GLM),
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM, {**_STABLELM, "sliding_window": 24}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT2),
    "olmoe": (
        OlmoeConfig,
        OlmoeForCausalLM,
        {**_STABLELM, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "granite-moe": (
        GraniteMoeConfig,
        GraniteMoeForCausalLM,
        {
            **_DECODER,
            "intermediate_size": 48,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    "phimoe": (
        PhimoeConfig,
        PhimoeForCausalLM,
        {
            **_DECODER,
            "intermediate_size": 48,
            "num_local_experts": 6,
            # So wide that several experts count beside the largest.
            "router_jitter_noise": 0.2,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "glm4-moe": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {
            **_MOE,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    # The shape of V2-Lite: queries without a latent of their own.
    "deepseek-v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.9),
        },
    ),
    "deepseek-v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {**_DEEPSEEK, "q_lora_rank": 40, "n_group": 4, "topk_group": 2, "attention_bias": True},
    ),
    "glm4-moe-lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, {**_DEEPSEEK, "q_lora_rank": 40}),
    "youtu": (YoutuConfig, YoutuForCausalLM, {**_LATENT, "q_lora_rank": 40}),
    "dots1": (
        Dots1Config,
        Dots1ForCausalLM,
        {**_MOE, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": True},
    ),
    "gpt-oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            **_DECODER,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 24,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False),
        },
    ),
    "gptj": (GPTJConfig, GPTJForCausalLM, {**_GPT2, "rotary_dim": 8}),
    "gpt-bigcode": (GPTBigCodeConfig, GPTBigCodeForCausalLM, {**_GPT2, "n_head": 4}),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _GPT_NEOX),
    "gpt-neox-sequential": (GPTNeoXConfig, GPTNeoXForCausalLM, {**_GPT_NEOX, "use_parallel_residual": False}),
    "phi": (PhiConfig, PhiForCausalLM, _STABLELM),
    "phi-norms": (PhiConfig, PhiForCausalLM, {**_STABLELM, "qk_layernorm": True}),
    "qwen3-next": (Qwen3NextConfig, Qwen3NextForCausalLM, {**_DELTA_NET, **_SHARED_EXPERT}),
    "qwen3.5": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, _DELTA_NET),
    "qwen3.5-moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM, {**_DELTA_NET, **_SHARED_EXPERT}),
    "granite-hybrid": (GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, _GRANITE_HYBRID),
    "granite-hybrid-dense": (
        GraniteMoeHybridConfig,
        GraniteMoeHybridForCausalLM,
        {**_GRANITE_HYBRID, "num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "bamba": (BambaConfig, BambaForCausalLM, _BAMBA),
    "opt": (OPTConfig, OPTForCausalLM, _OPT),
    "opt-350m": (OPTConfig, OPTForCausalLM, {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "bloom": (BloomConfig, BloomForCausalLM, _BLOOM),
    "falcon": (FalconConfig, FalconForCausalLM, _FALCON),
    "falcon-new": (
        FalconConfig,
        FalconForCausalLM,
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-rw": (
        FalconConfig,
        FalconForCausalLM,
        {**_FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "mpt": (MptConfig, MptForCausalLM, _MPT),
    "mpt-clipped": (MptConfig, MptForCausalLM, {**_MPT, "attn_config": {"clip_qkv": 0.7}}),
}
"""Name → transformers' config class, its model class, and the options of a small model."""


def make_checkpoint(
    folder: str | Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of a small random model; `overrides` are options of the family's transformers config."""
    folder = Path(folder)
    config_class, model_class, options = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # transformers' own scale would make all logits alike; with this one tokens, positions and layers differ.
        model = model_class(config_class(**{"initializer_range": 0.12, **options, **overrides})).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name or name.endswith("_bias"):
                torch.nn.init.normal_(parameter, _mean_of_vector(family, name), 0.1)
            if family == "gpt-oss" and name.endswith("gate_up_proj"):
                parameter.detach().mul_(4)  # so large that the limits of its gate bend it
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # As large as the differences between scores, so that it moves the choice.
                torch.nn.init.normal_(buffer, 0.0, 0.1)
    torch_dtype = getattr(torch, dtype)
    model.to(torch_dtype)
    model.config.dtype = torch_dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


def _mean_of_vector(family: str, name: str) -> float:
    if "bias" in name:
        return 0.0
    if family.startswith("qwen3.5") or family == "qwen3-next":
        # Their norms multiply by 1 + weight, too, but that of a gated delta net does not.
        return 1.0 if "norm" not in name or "linear_attn" in name else 0.0
    if not family.startswith("gemma"):
        return 1.0
    # Gemma's norms multiply by 1 + weight. Layers speak louder than its scaled, tied embeddings: those alone would
    # repeat the last token.
    return 3.0 if "post_" in name else 0.0


def reference_model(folder: str | Path) -> PreTrainedModel:
    """transformers' model of a checkpoint, in float32 whatever the checkpoint's dtype."""
    config = json.loads((Path(folder) / "config.json").read_text())
    # With eager attention transformers adds Falcon's ALiBi twice.
    attention = "sdpa" if config.get("model_type") == "falcon" and config["alibi"] else "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """One token per byte, then <pad>, <s>, </s>, <unk>: any text comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
