"""HeadShape: how many heads attention has, and how wide they are."""

from typing import NamedTuple

from quire.model_config.config_json import ConfigJson
from quire.model_config.latent import LatentShape, read_latent


class HeadShape(NamedTuple):
    """What config.json says of the heads."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    latent: LatentShape | None


def read_heads(config: ConfigJson, hidden_size: int) -> HeadShape:
    """The heads; with latent attention all of them read one row as wide as `head_dim`."""
    num_heads = config.integer("num_attention_heads")
    latent = read_latent(config)
    if latent is not None:
        return HeadShape(num_heads, 1, latent.row_dim, latent)
    num_kv_heads = _num_kv_heads(config, num_heads)
    if num_heads % num_kv_heads:
        raise config.refusal("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads {num_heads}")
    return HeadShape(num_heads, num_kv_heads, _head_dim(config, hidden_size, num_heads), None)


def _head_dim(config: ConfigJson, hidden_size: int, num_heads: int) -> int:
    if config.value("head_dim") is None and hidden_size % num_heads:
        raise config.refusal("hidden_size", hidden_size, f"a multiple of num_attention_heads {num_heads}")
    return config.integer("head_dim", hidden_size // num_heads)


def _num_kv_heads(config: ConfigJson, num_heads: int) -> int:
    """One or as many as query heads where a family has the flag `multi_query`, which Falcon's newer layers ignore."""
    if config.value("multi_query") is None or config.flag("new_decoder_architecture"):
        return config.integer("num_key_value_heads", num_heads)
    return 1 if config.flag("multi_query") else num_heads
