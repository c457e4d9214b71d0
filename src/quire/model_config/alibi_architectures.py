"""The rows of ARCHITECTURES whose layers may have ALiBi."""

from quire.model_config.architecture import Architecture

ALIBI_ARCHITECTURES: dict[str, Architecture] = {
    "BloomForCausalLM": Architecture(
        model="quire.models.bloom:Bloom",
        names={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
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
            "num_key_value_heads": "num_kv_heads",
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "activation",
            "rms_norm_eps": "layer_norm_epsilon",
            "attention_bias": "bias",
            "mlp_bias": "bias",
            "parallel_residual": "parallel_attn",
        },
        aliases={"n_embed": "hidden_size"},
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
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
            "rms_norm_eps": "layer_norm_epsilon",
            "alibi_bias_max": "attn_config.alibi_bias_max",
            "clip_qkv": "attn_config.clip_qkv",
        },
        aliases={"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
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
ALIBI_ARCHITECTURES["MPTForCausalLM"] = ALIBI_ARCHITECTURES["MptForCausalLM"]  # as published
