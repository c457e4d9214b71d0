"""ARCHITECTURES: the list of what Quire can load, one row for each name in `architectures` of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STANDARD_LAYERS = "quire.model_config.decoder_layers:decoder_layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of ARCHITECTURES: the class of a family, and what its config.json leaves unsaid.

    Keys are those that `ModelConfig.from_folder` reads; its source lists them. Besides the usual keys of config.json
    these are Quire's own: `gated_mlp`, `norm`, `norm_bias`, `norm_unit_offset`, `qk_norm`, `qk_norm_per_head`,
    `qk_norm_bias`, `qkv_bias`, `o_bias`, `learned_positions`, `position_offset`, `rotary_elements`, `rotary_layout`,
    `scale_embeddings`, `parallel_residual`, `parallel_mlp_norm`, `pre_norms`, `post_norms`, `norm_before`,
    `no_final_norm`, `qk_norm_joint`, `scale_queries`, `sliding_window_pattern`, `positions_are_stretched`,
    `rope_in_windows_only`, `embedding_width`, `head_bias`.
    """

    model: str
    """The class, as "module:Class"; imported when a checkpoint needs it."""
    layers: str = STANDARD_LAYERS
    """A function ModelConfig → tuple[LayerSpec, ...], as "module:function", in a module without torch. A family whose
    layers do not follow from the fields of `ModelConfig` names its own."""
    names: Mapping[str, str] = field(default_factory=dict)
    """A key → how this family spells it in config.json."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Values that config.json may omit, by the family's spelling."""
    meanings: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    """A key → values of config.json by which the family means another one."""
    section: str = ""
    """The object of config.json that describes the text model, where the model reads more than text."""
    fixed: Mapping[str, bool] = field(default_factory=dict)
    """Flags of config.json that are supported with this one value; null is false."""


_GPT2_NAMES: dict[str, str] = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
_GPT2_IMPLIED: dict[str, Any] = {
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "gated_mlp": False,
    "norm": "layer_norm",
    "norm_bias": True,
    "learned_positions": True,
}

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
    "use_sliding_window": True,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
# transformers reads the soft-cap of scores, and does not apply it.
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
        implied={"max_position_embeddings": 2048, "use_sliding_window": False},
    ),
    "MistralForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
    "MinistralForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
    "Ministral3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
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
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
    "Mistral3ForConditionalGeneration": Architecture(
        model="quire.models.mistral3:Mistral3Text",
        implied={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "scale_queries": True,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
        section="text_config",
    ),
    "Qwen2ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={"max_position_embeddings": 32768, "qkv_bias": True, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
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
            "use_sliding_window": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
        },
        fixed={"use_bidirectional_attention": False},
    ),
    "Gemma3ForCausalLM": Architecture(
        model="quire.models.gemma2:Gemma2",
        names={"hidden_act": "hidden_activation"},
        implied=_GEMMA3,
        fixed=_GEMMA3_FIXED,
    ),
    "Gemma3ForConditionalGeneration": Architecture(
        model="quire.models.gemma3:Gemma3Text",
        names={"hidden_act": "hidden_activation"},
        implied=_GEMMA3,
        section="text_config",
        fixed=_GEMMA3_FIXED,
    ),
    "GraniteForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={"max_position_embeddings": 2048, "attention_multiplier": 1.0},
    ),
    "SmolLM3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
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
        names={"rms_norm_eps": "layer_norm_eps", "qk_norm": "use_qk_norm"},
        implied={**_COHERE, "rope_theta": 5e5},
        fixed={"use_parallel_block": True, "use_gated_activation": True},
    ),
    "Cohere2ForCausalLM": Architecture(
        model="quire.models.cohere:Cohere",
        names={"rms_norm_eps": "layer_norm_eps"},
        implied={
            **_COHERE,
            "use_sliding_window": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_in_windows_only": True,
        },
        fixed={"use_parallel_block": True, "use_gated_activation": True, "use_qk_norm": False},
    ),
    "MixtralForCausalLM": Architecture(
        model="quire.models.mixtral:Mixtral",
        names={"num_experts": "num_local_experts"},
        implied={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
    "Phi3ForCausalLM": Architecture(
        model="quire.models.phi3:Phi3",
        implied={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
        fixed={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False},
    ),
    "Exaone4ForCausalLM": Architecture(
        model="quire.models.olmo2:OLMo2",
        implied={
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "pre_norms": False,
            "post_norms": True,
            "qk_norm": True,
            "use_sliding_window": True,
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
        implied={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
        },
        fixed={"bias": False},
    ),
    "GlmForCausalLM": Architecture(model="quire.models.glm:Glm", implied=_GLM),
    "Glm4ForCausalLM": Architecture(model="quire.models.glm:Glm", implied={**_GLM, "post_norms": True}),
    "Starcoder2ForCausalLM": Architecture(
        model="quire.models.starcoder2:StarCoder2",
        names={"rms_norm_eps": "norm_epsilon", "attention_bias": "use_bias", "mlp_bias": "use_bias"},
        implied={
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "norm": "layer_norm",
            "norm_bias": True,
            "gated_mlp": False,
            "use_bias": True,
            "use_sliding_window": True,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
    ),
    "GPT2LMHeadModel": Architecture(
        model="quire.models.gpt2:GPT2",
        names=_GPT2_NAMES,
        implied=_GPT2_IMPLIED,
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "GPTJForCausalLM": Architecture(
        model="quire.models.gptj:GPTJ",
        names={**_GPT2_NAMES, "rotary_elements": "rotary_dim"},
        implied={
            "n_positions": 2048,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "mlp_bias": True,
            "head_bias": True,
            "gated_mlp": False,
            "norm": "layer_norm",
            "norm_bias": True,
            "parallel_residual": True,
            "rotary_dim": 64,
            "rotary_layout": "interleaved",
        },
    ),
    "GPTBigCodeForCausalLM": Architecture(
        model="quire.models.gpt_bigcode:GPTBigCode",
        names=_GPT2_NAMES,
        implied={**_GPT2_IMPLIED, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
        fixed={"scale_attn_weights": True, "add_cross_attention": False},
    ),
    "GPTNeoXForCausalLM": Architecture(
        model="quire.models.gpt_neox:GPTNeoX",
        names={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
            "parallel_residual": "use_parallel_residual",
        },
        implied={
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "norm": "layer_norm",
            "norm_bias": True,
            "use_parallel_residual": True,
            "parallel_mlp_norm": True,
            "rotary_pct": 0.25,
        },
    ),
    "PhiForCausalLM": Architecture(
        model="quire.models.phi:Phi",
        names={"rms_norm_eps": "layer_norm_eps", "qk_norm": "qk_layernorm"},
        implied={
            "max_position_embeddings": 2048,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "gated_mlp": False,
            "norm": "layer_norm",
            "norm_bias": True,
            "parallel_residual": True,
            "qk_norm_bias": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    "OPTForCausalLM": Architecture(
        model="quire.models.opt:OPT",
        names={
            "intermediate_size": "ffn_dim",
            "hidden_act": "activation_function",
            "attention_bias": "enable_bias",
            "mlp_bias": "enable_bias",
            "norm_before": "do_layer_norm_before",
            "no_final_norm": "_remove_final_layer_norm",
            "embedding_width": "word_embed_proj_dim",
        },
        implied={
            "ffn_dim": 3072,
            "max_position_embeddings": 2048,
            "activation_function": "relu",
            "rms_norm_eps": 1e-5,
            "enable_bias": True,
            "gated_mlp": False,
            "norm": "layer_norm",
            "norm_bias": True,
            "learned_positions": True,
            "position_offset": 2,
            "tie_word_embeddings": True,
        },
        fixed={"layer_norm_elementwise_affine": True},
    ),
}
