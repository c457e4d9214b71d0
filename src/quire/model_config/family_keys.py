"""Which keys of config.json a family reads. A key that another family owns has no effect.

transformers gives each family a config class and a model that read some keys and leave the rest unread. `ModelConfig`
reads the keys of all families, so a row of ARCHITECTURES has to say which of them are its own: those in `implied`,
`names`, `aliases` and `fixed`, and those that it `reads` without a default. `constants` are what a family has whatever
its config.json says. Keys outside both sets below are read for every family.
"""

from typing import Any

from quire.model_config.architecture import Architecture

OPTIONAL_KEYS = frozenset(
    {
        *("attention_bias", "mlp_bias", "lm_head_bias", "qkv_bias", "bias", "use_bias", "clip_qkv", "alibi"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "layer_types"),
        *("no_rope_layers", "no_rope_layer_interval", "rope_local_base_freq", "partial_rotary_factor"),
        *("query_pre_attn_scalar", "attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping"),
        *("embedding_multiplier", "residual_multiplier", "logit_scale", "logits_scaling"),
        *("multi_query", "new_decoder_architecture", "num_ln_in_parallel_attn"),
        *("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size", "decoder_sparse_step"),
        *("mlp_layer_types", "moe_layer_end_index", "relative_attention_num_buckets"),
        *("n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace", "mlp_only_layers"),
        *("n_group", "topk_group", "routed_scaling_factor", "router_jitter_noise"),
        *("attn_layer_indices", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    }
)
"""Keys of config.json that take effect only in a family that names them."""

OWN_KEYS = frozenset(
    {
        *("gated_mlp", "norm", "norm_bias", "norm_unit_offset", "norm_before", "pre_norms", "post_norms"),
        *("no_final_norm", "embedding_norm", "parallel_residual", "parallel_mlp_norm"),
        *("qk_norm", "qk_norm_per_head", "qk_norm_bias", "qk_norm_joint", "o_bias", "head_bias"),
        *("learned_positions", "position_offset", "positions_are_stretched", "embedding_width", "scale_embeddings"),
        *("rotary_elements", "rotary_layout", "rope_in_windows_only", "rope_mscales", "rope_sections", "scale_queries"),
        *("alternate_windows", "alibi_before_scale", "router", "shared_expert_gate"),
        *("expert_bias", "attention_sinks", "latent_attention", "interleaves"),
        *("attention_gate", "recurrent_kind", "rope_alpha", "rope_if_asked", "mlp_width_without_experts"),
        *("is_encoder", "positions_include_offset", "mlp_down_bias", "no_first_norm"),
    }
)
"""Quire's own words for what families differ in. A row sets them; config.json only does under a family's spelling."""


def keys_of_family(row: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that the row's family reads."""
    return {key: value for key, value in config.items() if reads(row, key)}


def reads(row: Architecture, key: str) -> bool:
    """Whether a key of config.json takes effect in the row's family."""
    if key in row.reads or key in row.fixed or key in row.names.values():
        return True
    if key in row.aliases or key in row.aliases.values():
        return True
    return key not in OWN_KEYS and (key not in OPTIONAL_KEYS or key in row.implied)
