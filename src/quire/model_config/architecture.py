"""Architecture: what a row of ARCHITECTURES says about a family."""

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
    `rope_in_windows_only`, `embedding_width`, `head_bias`, `alternate_windows`,
    `router`, `shared_expert_gate`, `expert_bias`, `attention_sinks`, `latent_attention`,
    `interleaves`, `rope_mscales`, `alibi`, `alibi_before_scale`, `embedding_norm`, `recurrent_kind`, `attention_gate`,
    `rope_if_asked`, `mlp_width_without_experts`, `is_encoder`, `num_token_types`, `positions_include_offset`,
    `mlp_down_bias`, `no_first_norm`, `rope_sections`, `rope_alpha`.
    """

    model: str
    """The class, as "module:Class"; imported when a checkpoint needs it."""
    layers: str = STANDARD_LAYERS
    """A function ModelConfig → tuple[LayerSpec, ...], as "module:function", in a module without torch. A family whose
    layers do not follow from the fields of `ModelConfig` names its own."""
    names: Mapping[str, str] = field(default_factory=dict)
    """A key → how this family spells it in config.json."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Another spelling of config.json → the one of `names`, which wins where a file has both."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Values that config.json may omit, by the family's spelling."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Values that the family has whatever config.json says; None stands for a key that is missing."""
    reads: tuple[str, ...] = ()
    """Keys of `quire.model_config.family_keys` that the family reads and that have no default of its own."""
    meanings: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    """A key → values of config.json by which the family means another one."""
    section: str = ""
    """The object of config.json that describes the text model, where the model reads more than text."""
    text_model: str = ""
    """Where the section's model_type names the text model's row: the type that is meant where it is left out."""
    vision: str = ""
    """The family of the image encoder, a row of `quire.images.FAMILIES`; empty for a model that reads text only."""
    fixed: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    """Keys of config.json that are supported with this one value; for a flag null is false."""
    quantizations: tuple[str, ...] = ()
    """Values of quantization_config.quant_method whose tensors the class reads."""
