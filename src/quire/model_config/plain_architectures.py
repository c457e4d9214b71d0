"""PLAIN_ARCHITECTURES: the rows of ARCHITECTURES whose MLPs have no gate."""

from typing import Any

from quire.model_config.architecture import Architecture

_GPT2_NAMES: dict[str, str] = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
_GPT2_ALIASES = {
    key: _GPT2_NAMES[key]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
}
# Biases everywhere, heads that divide the width, and a key for every query.
_PLAIN_HEADS: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None}
_GPT2_CONSTANTS: dict[str, Any] = {**_PLAIN_HEADS, "attention_bias": True, "mlp_bias": True}
_GPT2_IMPLIED: dict[str, Any] = {
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "gated_mlp": False,
    "norm": "layer_norm",
    "norm_bias": True,
    "learned_positions": True,
}

PLAIN_ARCHITECTURES: dict[str, Architecture] = {
    "ApertusForCausalLM": Architecture(
        model="quire.models.apertus:Apertus",
        layers="quire.model_config.decoder_layers:apertus_layers",
        reads=("attention_bias",),
        implied={
            "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-5,
            "qk_norm": True,
            "gated_mlp": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1.2e7,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        # Its class computes xIELU, whose numbers each layer learns.
        meanings={"hidden_act": {"xielu": "silu"}},
        fixed={"hidden_act": "xielu"},
    ),
    "Starcoder2ForCausalLM": Architecture(
        model="quire.models.starcoder2:StarCoder2",
        reads=("sliding_window",),
        constants={"use_sliding_window": True, "max_window_layers": 0},
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
            "tie_word_embeddings": True,
        },
    ),
    "GPT2LMHeadModel": Architecture(
        model="quire.models.gpt2:GPT2",
        names=_GPT2_NAMES,
        aliases=_GPT2_ALIASES,
        implied=_GPT2_IMPLIED,
        constants=_GPT2_CONSTANTS,
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "GPTJForCausalLM": Architecture(
        model="quire.models.gptj:GPTJ",
        names={**_GPT2_NAMES, "rotary_elements": "rotary_dim"},
        aliases=_GPT2_ALIASES,
        constants={
            **_PLAIN_HEADS,
            "mlp_bias": True,
            "rope_theta": None,
            "rope_parameters": None,
            "rope_scaling": None,
        },
        implied={
            "n_positions": 2048,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
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
        aliases=_GPT2_ALIASES,
        implied={**_GPT2_IMPLIED, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
        constants=_GPT2_CONSTANTS,
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
        constants={"num_key_value_heads": None, "mlp_bias": True},
        implied={
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
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
        constants={"attention_bias": True, "mlp_bias": True},
        implied={
            "max_position_embeddings": 2048,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
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
        constants={**_PLAIN_HEADS, "rms_norm_eps": 1e-5},
        implied={
            "ffn_dim": 3072,
            "max_position_embeddings": 2048,
            "activation_function": "relu",
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
