"""RECURRENT_ARCHITECTURES: the rows of ARCHITECTURES with recurrent layers beside those with attention."""

from typing import Any

from quire.model_config.architecture import Architecture

_QWEN: dict[str, Any] = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "norm_unit_offset": True,
    "qk_norm": True,
    "attention_gate": True,
    "partial_rotary_factor": 0.25,
    "recurrent_kind": "gated_delta",
    "full_attention_interval": 4,
}
_QWEN_EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "shared_expert_gate": True,
}
_QWEN3_5: dict[str, Any] = {**_QWEN, "num_key_value_heads": 4}
_QWEN3_5_MOE: dict[str, Any] = {**_QWEN, **_QWEN_EXPERTS, "num_experts": 256, "num_experts_per_tok": 8}

_QWEN_READS = ("attention_bias", "layer_types")

RECURRENT_ARCHITECTURES: dict[str, Architecture] = {
    "Qwen3NextForCausalLM": Architecture(
        model="quire.models.qwen3_next:Qwen3Next",
        reads=(*_QWEN_READS, "decoder_sparse_step", "mlp_only_layers"),
        aliases={"num_local_experts": "num_experts"},
        implied={**_QWEN, **_QWEN_EXPERTS, "num_experts": 512, "num_experts_per_tok": 10},
    ),
    "Qwen3_5ForCausalLM": Architecture(model="quire.models.qwen3_5:Qwen35", reads=_QWEN_READS, implied=_QWEN3_5),
    "Qwen3_5MoeForCausalLM": Architecture(model="quire.models.qwen3_5:Qwen35", reads=_QWEN_READS, implied=_QWEN3_5_MOE),
    "Qwen3_5ForConditionalGeneration": Architecture(
        model="quire.models.qwen3_5:Qwen35Text", reads=_QWEN_READS, implied=_QWEN3_5, section="text_config"
    ),
    "Qwen3_5MoeForConditionalGeneration": Architecture(
        model="quire.models.qwen3_5:Qwen35Text", reads=_QWEN_READS, implied=_QWEN3_5_MOE, section="text_config"
    ),
    "BambaForCausalLM": Architecture(
        model="quire.models.bamba:Bamba",
        reads=("attention_bias", "mlp_bias", "attn_layer_indices"),
        constants={"partial_rotary_factor": 0.5, "layer_types": None},
        implied={
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "recurrent_kind": "mamba2",
        },
    ),
    "GraniteMoeHybridForCausalLM": Architecture(
        model="quire.models.granite_hybrid:GraniteHybrid",
        reads=("attention_bias", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
        names={
            "num_experts": "num_local_experts",
            "shared_expert_intermediate_size": "shared_intermediate_size",
            "mlp_width_without_experts": "shared_intermediate_size",
        },
        aliases={"layers_block_type": "layer_types"},
        implied={
            "max_position_embeddings": 2048,
            "attention_multiplier": 1.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 1024,
            "router": "topk_softmax",
            "recurrent_kind": "mamba2",
            "rope_if_asked": True,
        },
    ),
}
