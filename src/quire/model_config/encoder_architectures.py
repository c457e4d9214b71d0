"""ENCODER_ARCHITECTURES: the rows of ARCHITECTURES whose tokens see the whole text, not only what comes before them."""

from dataclasses import replace
from typing import Any

from quire.model_config.architecture import Architecture

_CLASS = "quire.models.encoder:Encoder"
# Norms after the additions, a norm of the embeddings, biases everywhere, a key for every query.
_POST_NORM: dict[str, Any] = {
    "is_encoder": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "norm": "layer_norm",
    "norm_bias": True,
    "norm_before": False,
    "embedding_norm": True,
    "gated_mlp": False,
    "attention_bias": True,
    "mlp_bias": True,
}
_NAMES = {"rms_norm_eps": "layer_norm_eps", "num_token_types": "type_vocab_size"}
_HEADS: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": None}
_FIXED: dict[str, bool | int | float | str | None] = {"is_decoder": False, "add_cross_attention": False}

_BERT = Architecture(
    model=_CLASS,
    names=_NAMES,
    implied={**_POST_NORM, "learned_positions": True, "type_vocab_size": 2},
    constants=_HEADS,
    fixed={**_FIXED, "position_embedding_type": "absolute"},
)
# Positions begin behind the row of the padding token, which is token 1 in every published model.
_ROBERTA = replace(
    _BERT,
    implied={
        **_BERT.implied,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 514,
        "position_offset": 2,
        "positions_include_offset": True,
    },
    fixed={**_BERT.fixed, "pad_token_id": 1},
)
# Beside positions, each head adds a learned bias for the distance of a key, by buckets of distances.
_MPNET = replace(
    _ROBERTA,
    implied={**_ROBERTA.implied, "layer_norm_eps": 1e-12, "type_vocab_size": 0, "relative_attention_num_buckets": 32},
)
# No positions: each head takes off its slope times the distance, on both sides.
_JINA_V2 = replace(
    _BERT,
    implied={
        **_POST_NORM,
        "type_vocab_size": 2,
        "max_position_embeddings": 8192,
        "gated_mlp": True,
        "mlp_bias": False,
        "mlp_down_bias": True,
    },
    constants={**_HEADS, "alibi": True, "hidden_act": "gelu"},
    fixed={**_FIXED, "position_embedding_type": "alibi", "feed_forward_type": "geglu"},
)
_DISTILBERT = Architecture(
    model=_CLASS,
    names={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    },
    implied={**_POST_NORM, "activation": "gelu", "learned_positions": True},
    constants={**_HEADS, "rms_norm_eps": 1e-12},
)
_ROTARY = {**_POST_NORM, "type_vocab_size": 2}
_NOMIC = Architecture(
    model=_CLASS,
    names=_NAMES,
    aliases={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
        "activation_function": "hidden_act",
        "rotary_emb_base": "rope_theta",
    },
    implied={
        **_ROTARY,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 1000.0,
    },
    meanings={"hidden_act": {"swiglu": "silu"}},
    constants=_HEADS,
    # What Nomic's own code can vary and its published text models do not.
    fixed={
        **_FIXED,
        "prenorm": False,
        "use_rms_norm": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_scaling_factor": None,
        "num_experts": None,
    },
)
_GTE = Architecture(
    model=_CLASS,
    names=_NAMES,
    implied={
        **_ROTARY,
        "type_vocab_size": 1,
        "max_position_embeddings": 8192,
        "gated_mlp": True,
        "mlp_down_bias": True,
        "mlp_bias": False,
        "rope_theta": 160000.0,
    },
    constants=_HEADS,
    fixed={"position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False},
)
_JINA_V3 = Architecture(
    model=_CLASS,
    names=_NAMES,
    implied={
        **_ROTARY,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 8194,
        "rope_theta": 20000.0,
    },
    constants=_HEADS,
)
_MODERNBERT = Architecture(
    model=_CLASS,
    names={"rms_norm_eps": "norm_eps", "norm_bias": "norm_bias", "sliding_window": "local_attention"},
    aliases={"hidden_activation": "hidden_act", "global_rope_theta": "rope_theta"},
    reads=("layer_types", "attention_bias", "mlp_bias"),
    implied={
        "is_encoder": True,
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "norm": "layer_norm",
        "embedding_norm": True,
        "no_first_norm": True,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "rope_local_base_freq": 10000.0,
    },
    constants={**_HEADS, "use_sliding_window": True},
)

_FAMILIES: dict[str, Architecture] = {
    "Bert": _BERT,
    "Roberta": _ROBERTA,
    "XLMRoberta": _ROBERTA,
    "Camembert": _ROBERTA,
    "MPNet": _MPNET,
    "JinaBert": _JINA_V2,
    "DistilBert": _DISTILBERT,
    "NomicBert": _NOMIC,
    "Gte": _GTE,
    "New": _GTE,
    "JinaEmbeddingsV3": _JINA_V3,
    "ModernBert": _MODERNBERT,
}
ENCODER_ENDINGS = ("Model", "ForMaskedLM", "ForSequenceClassification")
"""The bare model and the model of masked words give embeddings, the classifier scores."""

ENCODER_ARCHITECTURES: dict[str, Architecture] = {
    f"{family}{ending}": row for family, row in _FAMILIES.items() for ending in ENCODER_ENDINGS
}
