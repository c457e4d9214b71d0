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
    `qkv_bias`, `learned_positions`, `rotary_elements`, `rotary_layout`, `scale_embeddings`, `parallel_residual`,
    `parallel_mlp_norm`, `post_norms`, `sliding_window_pattern`, `head_bias`, `alibi`, `alibi_before_scale`,
    `embedding_norm`.
    """

    model: str
    """The class, as "module:Class"; imported when a checkpoint needs it."""
    layers: str = STANDARD_LAYERS
    """A function ModelConfig → tuple[LayerSpec, ...], as "module:function", in a module without torch. A family whose
    layers do not follow from the fields of `ModelConfig` names its own."""
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """A key → how this family spells it in config.json; of several spellings the first one that the file has."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Values that config.json may omit, by the family's spelling."""
    fixed: Mapping[str, bool | int | str | None] = field(default_factory=dict)
    """Keys of config.json that are supported with this one value; for a flag null is false."""


_GPT2_NAMES: dict[str, str | tuple[str, ...]] = {
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
    "GPTBigCodeForCausalLM": Architecture(
        model="quire.models.gpt_bigcode:GPTBigCode",
        names=_GPT2_NAMES,
        implied={**_GPT2_IMPLIED, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
        fixed={"scale_attn_weights": True, "add_cross_attention": False},
    ),
    "GPTJForCausalLM": Architecture(
        model="quire.models.gptj:GPTJ",
        names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
            "rotary_elements": "rotary_dim",
        },
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
    "BloomForCausalLM": Architecture(
        model="quire.models.bloom:Bloom",
        names={
            "hidden_size": ("hidden_size", "n_embed"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        implied={
            "seq_length": 2048,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "norm": "layer_norm",
            "norm_bias": True,
            "embedding_norm": True,
            "alibi": True,
        },
        fixed={"apply_residual_connection_post_layernorm": False},
    ),
    "FalconForCausalLM": Architecture(
        model="quire.models.falcon:Falcon",
        names={
            "hidden_size": ("hidden_size", "n_embed"),
            "num_key_value_heads": "num_kv_heads",
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "activation",
            "rms_norm_eps": "layer_norm_epsilon",
            "attention_bias": "bias",
            "mlp_bias": "bias",
            "parallel_residual": "parallel_attn",
        },
        implied={
            "max_position_embeddings": 2048,
            "activation": "gelu",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "gated_mlp": False,
            "norm": "layer_norm",
            "norm_bias": True,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "alibi_before_scale": True,
        },
    ),
    "MptForCausalLM": Architecture(
        model="quire.models.mpt:MPT",
        names={
            "hidden_size": ("d_model", "hidden_size"),
            "num_hidden_layers": ("n_layers", "num_hidden_layers"),
            "num_attention_heads": ("n_heads", "num_attention_heads"),
            "max_position_embeddings": "max_seq_len",
            "rms_norm_eps": "layer_norm_epsilon",
            "alibi_bias_max": "attn_config.alibi_bias_max",
            "clip_qkv": "attn_config.clip_qkv",
        },
        implied={
            "max_seq_len": 2048,
            "hidden_act": "gelu",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "gated_mlp": False,
            "norm": "layer_norm",
            "alibi": True,
        },
        fixed={
            "no_bias": True,
            "expansion_ratio": 4,
            "logit_scale": None,
            "attn_config.alibi": True,
            "attn_config.attn_type": "multihead_attention",
            "attn_config.prefix_lm": False,
            "attn_config.qk_ln": False,
            "attn_config.softmax_scale": None,
        },
    ),
}
ARCHITECTURES["MPTForCausalLM"] = ARCHITECTURES["MptForCausalLM"]  # as published
