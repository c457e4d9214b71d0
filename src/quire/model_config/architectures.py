"""ARCHITECTURES: the list of what Quire can load, one row for each name in `architectures` of a config.json."""

from typing import Any

from quire.model_config.alibi_architectures import ALIBI_ARCHITECTURES
from quire.model_config.architecture import STANDARD_LAYERS, Architecture
from quire.model_config.encoder_architectures import ENCODER_ARCHITECTURES
from quire.model_config.expert_architectures import EXPERT_ARCHITECTURES
from quire.model_config.hunyuan_architectures import HUNYUAN_ARCHITECTURES
from quire.model_config.plain_architectures import PLAIN_ARCHITECTURES
from quire.model_config.recurrent_architectures import RECURRENT_ARCHITECTURES
from quire.model_config.vision_architectures import VISION_ARCHITECTURES

__all__ = ["ARCHITECTURES", "STANDARD_LAYERS", "Architecture"]


_GLM: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "o_bias": False,
    "partial_rotary_factor": 0.5,
    "rotary_layout": "interleaved",
    "eos_token_id": [151329, 151336, 151338],
}

_GEMMA3: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "positions_are_stretched": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "norm_unit_offset": True,
    "post_norms": True,
    "qk_norm": True,
    "scale_embeddings": True,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
# transformers reads the soft-cap of scores, and does not apply it.
_GEMMA3_READS = ("attention_bias", "layer_types", "final_logit_softcapping")
_GEMMA3_FIXED = {"use_bidirectional_attention": False, "attn_logit_softcapping": False}
_COHERE: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "norm": "layer_norm",
    "qk_norm_per_head": True,
    "parallel_residual": True,
    "rotary_layout": "interleaved",
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("attention_bias", "mlp_bias"),
        implied={"max_position_embeddings": 2048},
    ),
    "MistralForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        constants={"use_sliding_window": True, "max_window_layers": 0},
        implied={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "MinistralForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("layer_types",),
        constants={"use_sliding_window": True, "max_window_layers": 0},
        implied={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "Ministral3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("sliding_window",),
        constants={"use_sliding_window": True, "max_window_layers": 0},
        implied={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "scale_queries": True,
        },
    ),
    "Mistral3ForConditionalGeneration": Architecture(
        model="quire.models.mistral3:Mistral3Text",
        reads=("sliding_window",),
        constants={"use_sliding_window": True, "max_window_layers": 0},
        implied={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "scale_queries": True,
        },
        section="text_config",
    ),
    "Qwen2ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("use_sliding_window", "max_window_layers", "layer_types"),
        constants={"qkv_bias": True},
        implied={"max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("attention_bias", "use_sliding_window", "max_window_layers", "layer_types"),
        implied={"max_position_embeddings": 32768, "head_dim": 128, "qk_norm": True, "sliding_window": 4096},
    ),
    "StableLmForCausalLM": Architecture(
        model="quire.models.stablelm:StableLM",
        names={
            "rms_norm_eps": "layer_norm_eps",
            "qkv_bias": "use_qkv_bias",
            "qk_norm": "qk_layernorm",
            "parallel_residual": "use_parallel_residual",
        },
        implied={
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "norm": "layer_norm",
            "norm_bias": True,
            "qk_norm_per_head": True,
            "partial_rotary_factor": 0.25,
        },
    ),
    "GemmaForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("attention_bias",),
        # Its files say gelu, and the models were trained with the approximation by tanh.
        meanings={"hidden_act": {"gelu": "gelu_pytorch_tanh"}},
        implied={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_unit_offset": True,
            "scale_embeddings": True,
            "tie_word_embeddings": True,
        },
        fixed={"use_bidirectional_attention": False},
    ),
    "Gemma2ForCausalLM": Architecture(
        model="quire.models.gemma2:Gemma2",
        reads=("attention_bias", "layer_types"),
        constants={"use_sliding_window": True},
        names={"hidden_act": "hidden_activation"},
        implied={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "hidden_activation": "gelu_pytorch_tanh",
            "norm_unit_offset": True,
            "post_norms": True,
            "scale_embeddings": True,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
        },
        fixed={"use_bidirectional_attention": False},
    ),
    "Gemma3ForCausalLM": Architecture(
        model="quire.models.gemma2:Gemma2",
        reads=_GEMMA3_READS,
        constants={"use_sliding_window": True},
        # With attention to both sides it is EmbeddingGemma.
        names={"hidden_act": "hidden_activation", "is_encoder": "use_bidirectional_attention"},
        implied=_GEMMA3,
        fixed={"attn_logit_softcapping": False},
    ),
    "Gemma3ForConditionalGeneration": Architecture(
        model="quire.models.gemma3:Gemma3",
        vision="gemma3",
        reads=_GEMMA3_READS,
        constants={"use_sliding_window": True},
        names={"hidden_act": "hidden_activation"},
        implied=_GEMMA3,
        section="text_config",
        fixed=_GEMMA3_FIXED,
    ),
    "GraniteForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("attention_bias", "mlp_bias", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
        implied={"max_position_embeddings": 2048, "attention_multiplier": 1.0},
    ),
    "SmolLM3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=(
            *("attention_bias", "mlp_bias", "no_rope_layers"),
            *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        ),
        implied={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
    ),
    "Olmo2ForCausalLM": Architecture(
        model="quire.models.olmo2:OLMo2",
        reads=("attention_bias",),
        implied={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "pre_norms": False,
            "post_norms": True,
            "qk_norm": True,
            "qk_norm_joint": True,
        },
    ),
    "CohereForCausalLM": Architecture(
        model="quire.models.cohere:Cohere",
        reads=("attention_bias",),
        names={"rms_norm_eps": "layer_norm_eps", "qk_norm": "use_qk_norm"},
        implied={**_COHERE, "rope_theta": 5e5},
        fixed={"use_parallel_block": True, "use_gated_activation": True},
    ),
    "Cohere2ForCausalLM": Architecture(
        model="quire.models.cohere:Cohere",
        reads=("attention_bias", "layer_types"),
        constants={"use_sliding_window": True},
        names={"rms_norm_eps": "layer_norm_eps"},
        implied={
            **_COHERE,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_in_windows_only": True,
        },
        fixed={"use_parallel_block": True, "use_gated_activation": True, "use_qk_norm": False},
    ),
    **EXPERT_ARCHITECTURES,
    **ENCODER_ARCHITECTURES,
    **HUNYUAN_ARCHITECTURES,
    **RECURRENT_ARCHITECTURES,
    "GlmForCausalLM": Architecture(model="quire.models.glm:Glm", implied=_GLM),
    "Glm4ForCausalLM": Architecture(model="quire.models.glm:Glm", implied={**_GLM, "post_norms": True}),
    **PLAIN_ARCHITECTURES,
    **ALIBI_ARCHITECTURES,
    **VISION_ARCHITECTURES,
    "Phi3ForCausalLM": Architecture(
        model="quire.models.phi3:Phi3",
        reads=("sliding_window", "partial_rotary_factor"),
        constants={"use_sliding_window": True, "max_window_layers": 0},
        implied={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "SeedOssForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("mlp_bias",),
        names={"o_bias": "attention_out_bias"},
        implied={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
        },
    ),
    "Ernie4_5ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        names={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
        implied={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rotary_layout": "interleaved",
            "use_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "HeliumForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("mlp_bias",),
        implied={
            "num_key_value_heads": 20,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-8,
            "rope_theta": 1e5,
            "rotary_layout": "interleaved",
            "attention_bias": False,
            "o_bias": False,
        },
    ),
    "CwmForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("layer_types", "mlp_bias"),
        constants={"use_sliding_window": True},
        implied={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
            "sliding_window": 8192,
            "sliding_window_pattern": "GLLL",
            "eos_token_id": [128001, 128008, 128009],
        },
    ),
    "Olmo3ForCausalLM": Architecture(
        model="quire.models.olmo2:OLMo2",
        reads=("attention_bias", "layer_types"),
        constants={"use_sliding_window": True},
        implied={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "pre_norms": False,
            "post_norms": True,
            "qk_norm": True,
            "qk_norm_joint": True,
            "rope_theta": 5e5,
            # A stretch is that of the layers without a window.
            "rope_local_base_freq": 5e5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
    ),
    "ArceeForCausalLM": Architecture(
        model="quire.models.arcee:Arcee",
        reads=("attention_bias", "mlp_bias"),
        implied={
            "max_position_embeddings": 4096,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "gated_mlp": False,
        },
    ),
    "Exaone4ForCausalLM": Architecture(
        model="quire.models.olmo2:OLMo2",
        reads=("layer_types",),
        constants={"use_sliding_window": True},
        implied={
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "pre_norms": False,
            "post_norms": True,
            "qk_norm": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_in_windows_only": True,
        },
    ),
    "InternLM2ForCausalLM": Architecture(
        model="quire.models.internlm2:InternLM2",
        names={"attention_bias": "bias"},
        implied={"max_position_embeddings": 2048, "bias": True},
    ),
    "InternLM3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        reads=("qkv_bias",),
        implied={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
        },
        fixed={"bias": False},
    ),
}
