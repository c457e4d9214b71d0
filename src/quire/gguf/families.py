"""FAMILIES: llama.cpp's architectures that Quire reads, one row for each.

A row names the row of ARCHITECTURES that computes the model, gives every tensor the name that Hugging Face's
checkpoints have for it, and says what llama.cpp's converter did to the tensors. What follows from other metadata is in
`quire.model_config.gguf_config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RowOrder = Literal["stored", "pairs", "groups"]
"""How rows of queries and keys lie. stored: as in the original; pairs: a head's two halves interleaved, as llama.cpp
rotates them; groups: a fused matrix has all queries, all keys, all values, where the original has them KV head by KV
head."""

Names = Mapping[str, str]
"""A tensor's name in GGUF without its ending → in the original. "{expert}" stands for each expert of a stack, "{head}"
for each head. A name that begins with WHOLE is the original's whole name, which has no ending."""
WHOLE = "="


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of FAMILIES."""

    architecture: str
    """The row of ARCHITECTURES."""
    ends: Names
    """Tensors outside the layers."""
    layer: str = "model.layers.{}."
    """What precedes the names of a layer."""
    parts: Names
    """Tensors of a layer."""
    row_order: RowOrder = "stored"
    unit_offset: bool = False
    """Norms are stored as 1 + weight."""
    settings: Names = field(default_factory=dict)
    """A key of config.json → the key of the metadata, without the architecture before it. Numbers and flags."""
    rope: Mapping[str, Any] = field(default_factory=dict)
    """What is added to the object of a stretched rotary embedding."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What llama.cpp computes for the architecture, whatever the metadata say, by keys of config.json."""
    is_written: bool = True
    """Whether `quire convert` can write such files, too."""


_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_LLAMA = {**_TWO_NORMS, **_ATTENTION, **_MLP}
_LATE_NORM = {**_LLAMA, "post_attention_norm": "post_attention_layernorm"}
_POST_NORMS = {
    **_ATTENTION,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA2 = {**_POST_NORMS, "attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_EXPERTS = {
    **_LLAMA,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b": f"{WHOLE}mlp.gate.e_score_correction_bias",
}
_MIXTRAL = {
    **_LLAMA,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_PHIMOE = {**_MIXTRAL, "attn_output": "self_attn.o_proj"}
_GRANITE_MOE = {**_MIXTRAL, "ffn_gate_inp": "block_sparse_moe.router.layer"}
_GPT_OSS = {
    **_EXPERTS,
    "ffn_gate_inp": "mlp.router",
    "attn_sinks": f"{WHOLE}self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
}
_DEEPSEEK2 = {
    **_TWO_NORMS,
    **_MLP,
    **{part: name for part, name in _EXPERTS.items() if "ffn_" in part},
    **_SHARED_EXPERTS,
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "attn_output": "self_attn.o_proj",
}
_QWEN3_NEXT = {
    **_ATTENTION,
    **{part: name for part, name in _EXPERTS.items() if "ffn_" in part and part != "ffn_norm"},
    **_SHARED_EXPERT,
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ssm_in": "linear_attn.in_proj_qkvz",  # in files of the first weeks; later ones have the next two
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": f"{WHOLE}linear_attn.A_log",
    "ssm_dt": f"{WHOLE}linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_STABLELM = {
    **_LLAMA,
    "attn_q_norm": "self_attn.q_layernorm.norms.{head}",
    "attn_k_norm": "self_attn.k_layernorm.norms.{head}",
}
_GPT2_ENDS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_FALCON_ENDS = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_FALCON = {
    **_TWO_NORMS,
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_PHI3 = {
    **_TWO_NORMS,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GRANITE_SETTINGS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_EXPERT_SETTINGS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_GROUPED_SETTINGS = {
    **_EXPERT_SETTINGS,
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
_DEEPSEEK2_SETTINGS = {
    **{key: stored for key, stored in _GROUPED_SETTINGS.items() if key != "norm_topk_prob"},
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "v_head_dim": "attention.value_length_mla",
}
_WINDOW = {"sliding_window": "attention.sliding_window"}
_GEMMA3_SETTINGS = {**_WINDOW, "rope_local_base_freq": "rope.freq_base_swa"}
_SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", ends=_ENDS, parts=_LLAMA, row_order="pairs"),
    "llama with experts": Family(
        architecture="MixtralForCausalLM", ends=_ENDS, parts=_MIXTRAL, row_order="pairs", settings=_EXPERT_SETTINGS
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", ends=_ENDS, parts=_LLAMA),
    "qwen3": Family(architecture="Qwen3ForCausalLM", ends=_ENDS, parts=_LLAMA),
    "qwen2moe": Family(
        architecture="Qwen2MoeForCausalLM",
        ends=_ENDS,
        parts={**_EXPERTS, **_SHARED_EXPERT},
        settings={**_EXPERT_SETTINGS, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    ),
    "qwen3moe": Family(
        architecture="Qwen3MoeForCausalLM",
        ends=_ENDS,
        parts=_EXPERTS,
        settings=_EXPERT_SETTINGS,
        values={"norm_topk_prob": True},
    ),
    "qwen3next": Family(
        architecture="Qwen3NextForCausalLM",
        ends=_ENDS,
        parts=_QWEN3_NEXT,
        unit_offset=True,
        settings={
            **_EXPERT_SETTINGS,
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
            "linear_num_key_heads": "ssm.group_count",
            "linear_num_value_heads": "ssm.time_step_rank",
            "linear_key_head_dim": "ssm.state_size",
            "linear_conv_kernel_dim": "ssm.conv_kernel",
        },
        values={"norm_topk_prob": True},
        is_written=False,
    ),
    "granitemoe": Family(
        architecture="GraniteMoeForCausalLM",
        ends=_ENDS,
        parts=_GRANITE_MOE,
        row_order="pairs",
        settings={
            **_GRANITE_SETTINGS,
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
        },
    ),
    "phimoe": Family(
        architecture="PhimoeForCausalLM",
        ends=_ENDS,
        parts=_PHIMOE,
        settings={**_WINDOW, "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        values={"head_bias": True},
    ),
    "gpt-oss": Family(
        architecture="GptOssForCausalLM",
        ends=_ENDS,
        parts=_GPT_OSS,
        settings={
            **_WINDOW,
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "intermediate_size": "expert_feed_forward_length",
        },
        rope={"truncate": False},
    ),
    "deepseek2": Family(
        architecture="DeepseekV2ForCausalLM", ends=_ENDS, parts=_DEEPSEEK2, settings=_DEEPSEEK2_SETTINGS
    ),
    "deepseek2 with sigmoids": Family(
        architecture="DeepseekV3ForCausalLM",
        ends=_ENDS,
        parts=_DEEPSEEK2,
        settings={**_DEEPSEEK2_SETTINGS, "norm_topk_prob": "expert_weights_norm"},
        values={"norm_topk_prob": False},
    ),
    "olmoe": Family(architecture="OlmoeForCausalLM", ends=_ENDS, parts=_EXPERTS, settings=_EXPERT_SETTINGS),
    "gemma": Family(architecture="GemmaForCausalLM", ends=_ENDS, parts=_LLAMA, unit_offset=True),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        ends=_ENDS,
        parts=_GEMMA2,
        unit_offset=True,
        settings={**_WINDOW, **_SOFTCAPS},
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM", ends=_ENDS, parts=_GEMMA2, unit_offset=True, settings=_GEMMA3_SETTINGS
    ),
    "olmo2": Family(architecture="Olmo2ForCausalLM", ends=_ENDS, parts=_POST_NORMS),
    "exaone4": Family(architecture="Exaone4ForCausalLM", ends=_ENDS, parts=_POST_NORMS, settings=_WINDOW),
    "granite": Family(
        architecture="GraniteForCausalLM",
        ends=_ENDS,
        parts=_LLAMA,
        row_order="pairs",
        settings=_GRANITE_SETTINGS,
    ),
    "smollm3": Family(architecture="SmolLM3ForCausalLM", ends=_ENDS, parts=_LLAMA, row_order="pairs"),
    "arcee": Family(architecture="ArceeForCausalLM", ends=_ENDS, parts=_LLAMA, row_order="pairs"),
    "ernie4_5": Family(architecture="Ernie4_5ForCausalLM", ends=_ENDS, parts=_LLAMA),
    "seed_oss": Family(architecture="SeedOssForCausalLM", ends=_ENDS, parts=_LATE_NORM),
    "command-r": Family(
        architecture="CohereForCausalLM", ends=_ENDS, parts=_LLAMA, settings={"logit_scale": "logit_scale"}
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        ends=_ENDS,
        parts=_LLAMA,
        settings={**_WINDOW, "logit_scale": "logit_scale"},
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        ends=_ENDS,
        parts={
            **_LLAMA,
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
    ),
    "glm4moe": Family(
        architecture="Glm4MoeForCausalLM",
        ends=_ENDS,
        parts={**_EXPERTS, **_LATE_NORM, **_SHARED_EXPERTS},
        settings=_GROUPED_SETTINGS,
    ),
    "dots1": Family(
        architecture="Dots1ForCausalLM",
        ends=_ENDS,
        parts={**_EXPERTS, **_SHARED_EXPERTS},
        settings=_GROUPED_SETTINGS,
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        ends=_ENDS,
        parts=_STABLELM,
        settings={"parallel_residual": "use_parallel_residual"},
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        ends=_ENDS,
        parts={**_LLAMA, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "phi2": Family(
        architecture="PhiForCausalLM",
        ends={**_ENDS, "output_norm": "model.final_layernorm"},
        parts={**_LLAMA, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    ),
    "phi3": Family(architecture="Phi3ForCausalLM", ends=_ENDS, parts=_PHI3, settings=_WINDOW),
    "gpt2": Family(architecture="GPT2LMHeadModel", ends=_GPT2_ENDS, layer="transformer.h.{}.", parts=_GPT2),
    "starcoder": Family(architecture="GPTBigCodeForCausalLM", ends=_GPT2_ENDS, layer="transformer.h.{}.", parts=_GPT2),
    "gptneox": Family(
        architecture="GPTNeoXForCausalLM",
        ends={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        layer="gpt_neox.layers.{}.",
        parts={**_FALCON, "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"},
        row_order="groups",
        settings={"parallel_residual": "use_parallel_residual"},
    ),
    "falcon": Family(
        architecture="FalconForCausalLM",
        ends=_FALCON_ENDS,
        layer="transformer.h.{}.",
        parts=_FALCON,
        row_order="groups",
    ),
    "falcon with two norms": Family(
        architecture="FalconForCausalLM",
        ends=_FALCON_ENDS,
        layer="transformer.h.{}.",
        parts={**_FALCON, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
        row_order="groups",
    ),
    "bloom": Family(
        architecture="BloomForCausalLM",
        ends=_FALCON_ENDS,
        layer="transformer.h.{}.",
        parts=_FALCON,
        row_order="groups",
    ),
    "mpt": Family(
        architecture="MptForCausalLM",
        ends={**_GPT2_ENDS, "output_norm": "transformer.norm_f"},
        layer="transformer.blocks.{}.",
        parts={
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
    ),
}
"""By `general.architecture`, with a word after it where one architecture stands for several families."""
