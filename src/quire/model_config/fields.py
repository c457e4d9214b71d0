"""read_fields: the fields of `ModelConfig`, read from a config.json of a family with a row."""

from typing import Any

from quire.dtypes import DTYPE_BYTES
from quire.model_config.activation import read_activation
from quire.model_config.alibi import read_alibi_slopes
from quire.model_config.config_json import ConfigJson
from quire.model_config.experts import mlp_width, read_experts
from quire.model_config.generic import MAX_LAYERS
from quire.model_config.heads import read_heads
from quire.model_config.norms import read_norms
from quire.model_config.recurrent import read_recurrent
from quire.model_config.rope import read_ropes
from quire.model_config.token_ids import end_tokens, read_first_token
from quire.model_config.vision import read_vision
from quire.model_config.windows import read_layer_windows


def read_fields(config: ConfigJson) -> dict[str, Any]:
    """The fields of `ModelConfig` that config.json says. Raises `CheckpointError` for values that are not supported."""
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    num_heads, num_kv_heads, head_dim, latent = read_heads(config, hidden_size)
    max_position = config.integer("max_position_embeddings")
    if config.flag("positions_include_offset"):
        max_position -= config.integer("position_offset")
    intermediate_size = config.integer(mlp_width(config), 4 * hidden_size)
    attention_bias = config.flag("attention_bias")
    alibi_slopes = read_alibi_slopes(config, num_heads, head_dim)
    embedding_width = config.integer("embedding_width", hidden_size)
    scaled = config.flag("scale_embeddings")
    windows = read_layer_windows(config, num_layers)
    unrotated = bool(alibi_slopes) or config.flag("learned_positions")
    rope_head_dim = head_dim if latent is None else latent.rope_dim
    ropes = (None, ()) if unrotated else read_ropes(config, max_position, rope_head_dim, windows)
    return dict(
        architecture=config.architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        **read_norms(config),
        activation=read_activation(config),
        gated_mlp=config.flag("gated_mlp", True),
        qkv_bias=config.flag("qkv_bias", attention_bias),
        o_bias=config.flag("o_bias", attention_bias),
        mlp_bias=config.flag("mlp_bias"),
        mlp_down_bias=config.flag("mlp_down_bias"),
        is_encoder=config.flag("is_encoder"),
        num_token_types=config.integer("num_token_types", 0, minimum=0),
        **read_experts(config, num_layers, intermediate_size),
        latent=latent,
        **read_recurrent(config, num_layers, hidden_size),
        attention_gate=config.flag("attention_gate"),
        clip_qkv=config.number("clip_qkv", 0.0),
        qk_norm=config.flag("qk_norm"),
        qk_norm_per_head=config.flag("qk_norm_per_head"),
        qk_norm_bias=config.flag("qk_norm_bias"),
        qk_norm_joint=config.flag("qk_norm_joint"),
        query_pre_attn_scalar=config.number("query_pre_attn_scalar", 0.0) or None,
        attention_multiplier=(latent.scale(ropes[0]) if latent else config.number("attention_multiplier", 0.0)) or None,
        attention_softcap=config.number("attn_logit_softcapping", 0.0),
        layer_windows=windows,
        attention_sinks=config.flag("attention_sinks"),
        alibi_slopes=alibi_slopes,
        num_distance_buckets=config.integer("relative_attention_num_buckets", 0, minimum=0),
        rope=ropes[0],
        layer_ropes=ropes[1],
        positions_are_stretched=config.flag("positions_are_stretched"),
        position_offset=config.integer("position_offset", 0, minimum=0),
        embedding_width=0 if embedding_width == hidden_size else embedding_width,
        embedding_multiplier=hidden_size**0.5 if scaled else config.number("embedding_multiplier", 1.0),
        round_embedding_multiplier=scaled,
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logits_multiplier=config.number("logit_scale", 1.0) / config.number("logits_scaling", 1.0),
        logits_softcap=config.number("final_logit_softcapping", 0.0),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        head_bias=config.flag("head_bias"),
        vision=read_vision(config, hidden_size),
        stored=config.stored,
        checkpoint_dtype=_checkpoint_dtype(config),
        bos_token_id=read_first_token(config),
        eos_token_ids=end_tokens(config.path, config.value("eos_token_id")),
    )


_DTYPE_ALIASES = {"half": "float16", "float": "float32", "double": "float32", "float64": "float32"}
"""Other names that torch has; nothing is computed in 64 bits."""


def _checkpoint_dtype(config: ConfigJson) -> str:
    """`dtype` or, as older files spell it, `torch_dtype`: bfloat16, or torch.bfloat16. auto says as much as nothing."""
    key = "dtype" if config.value("dtype") else "torch_dtype"
    value = config.value(key)
    if value in (None, "auto"):
        return "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    name = _DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in DTYPE_BYTES:
        raise config.refusal(key, value, ", ".join(DTYPE_BYTES))
    return name
