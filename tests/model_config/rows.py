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
ROWS = {"MixtralForCausalLM": MIXTRAL}
