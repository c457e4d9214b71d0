"""HUNYUAN_ARCHITECTURES: the rows of ARCHITECTURES that norm queries and keys after they were rotated."""

from typing import Any

from quire.model_config.architecture import Architecture

_HUNYUAN: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "qk_norm": True, "rope_alpha": True}

HUNYUAN_ARCHITECTURES: dict[str, Architecture] = {
    "HunYuanDenseV1ForCausalLM": Architecture(
        model="quire.models.hunyuan:Hunyuan", reads=("attention_bias",), implied=_HUNYUAN
    ),
    "HunYuanMoEV1ForCausalLM": Architecture(
        model="quire.models.hunyuan:HunyuanMoE",
        reads=("attention_bias",),
        # The shared network is as wide as an expert.
        names={"num_experts_per_tok": "moe_topk", "shared_expert_intermediate_size": "intermediate_size"},
        aliases={"num_local_experts": "num_experts", "num_experts_per_tok": "moe_topk"},
        implied={**_HUNYUAN, "num_experts": 1, "moe_topk": 1},
    ),
}
