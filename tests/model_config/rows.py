"""Rows of ARCHITECTURES for families that differ from Llama in what `ModelConfig` states as data."""

from quire.model_config import Architecture

MIXTRAL = Architecture(
    model="quire.models.mixtral:Mixtral",
    names={"num_experts": "num_local_experts"},
    implied={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
)
GEMMA2 = Architecture(
    model="quire.models.gemma2:Gemma2",
    names={"hidden_act": "hidden_activation"},
    implied={
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "use_sliding_window": True,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
        "norm_unit_offset": True,
        "post_norms": True,
        "scale_embeddings": True,
    },
    fixed={"use_bidirectional_attention": False},
)
ROWS = {"MixtralForCausalLM": MIXTRAL, "Gemma2ForCausalLM": GEMMA2}
