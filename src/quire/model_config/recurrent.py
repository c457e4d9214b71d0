"""What config.json says about recurrent layers: which layers they are, and the sizes of their state."""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from quire.model_config.config_json import ConfigJson

RecurrentKind = Literal["gated_delta", "mamba2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentConfig:
    """The recurrent layers of a model. A head's state is a matrix [key_dim, value_dim]; `quire.models.recurrent` has
    the rules."""

    kind: RecurrentKind
    layers: frozenset[int]
    """Indices of the recurrent layers."""
    num_key_heads: int
    """Each serves num_heads / num_key_heads heads."""
    num_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    conv_bias: bool = False
    bias: bool = False
    """The dense layers have biases."""
    step_limits: tuple[float, float] = (0.0, float("inf"))
    """Least and largest time step; read for mamba2."""

    @property
    def inner_size(self) -> int:
        """Elements of all heads' values."""
        return self.num_heads * self.value_dim

    @property
    def num_channels(self) -> int:
        """Channels of the convolution: the keys, queries and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.inner_size


class RecurrentFields(TypedDict, total=False):
    """The fields of `ModelConfig` that this module reads."""

    recurrent: RecurrentConfig


def read_recurrent(config: ConfigJson, num_layers: int, hidden_size: int) -> RecurrentFields:
    """The fields of `ModelConfig` for recurrent layers; none for a family without them."""
    kind = config.value("recurrent_kind")
    if kind is None:
        return {}
    layers = _read_layers(config, kind, num_layers)
    if not layers:
        return {}
    recurrent = _read_mamba2(config, layers, hidden_size) if kind == "mamba2" else _read_gated_delta(config, layers)
    if recurrent.num_heads % recurrent.num_key_heads:
        names = {"mamba2": ("mamba_n_heads", "mamba_n_groups")}
        heads, key_heads = names.get(kind, ("linear_num_value_heads", "linear_num_key_heads"))
        raise config.refusal(heads, recurrent.num_heads, f"a multiple of {key_heads} {recurrent.num_key_heads}")
    return {"recurrent": recurrent}


_KINDS_OF_LAYERS = {"linear_attention": True, "mamba": True, "full_attention": False, "attention": False}
"""config.json's name of a layer's kind → whether it is recurrent."""


def _read_layers(config: ConfigJson, kind: RecurrentKind, num_layers: int) -> frozenset[int]:
    """`layer_types` names each layer's kind, or `attn_layer_indices` those with attention. Without them every fourth
    layer has attention, or every `full_attention_interval`-th; but in Granite none has."""
    kinds = config.value("layer_types")
    attending = config.value("attn_layer_indices")
    if kinds is None and attending is not None:
        return _all_but(config, attending, num_layers)
    if kinds is None:
        interval = num_layers + 1 if kind == "mamba2" else config.integer("full_attention_interval", 4)
        kinds = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= _KINDS_OF_LAYERS.keys():
        raise config.refusal("layer_types", kinds, f"{num_layers} times one of {', '.join(_KINDS_OF_LAYERS)}")
    layers = frozenset(layer for layer, kind in enumerate(kinds) if _KINDS_OF_LAYERS[kind])
    if len(layers) == num_layers:
        raise config.refusal("layer_types", kinds, "at least one layer with attention")
    return layers


def _all_but(config: ConfigJson, attending: Any, num_layers: int) -> frozenset[int]:
    """All layers but those in `attending`."""
    layers = frozenset(range(num_layers))
    if not isinstance(attending, list) or not attending or not set(map(repr, attending)) <= set(map(repr, layers)):
        supported = f"a list of the layers with attention, at least one of 0 to {num_layers - 1}"
        raise config.refusal("attn_layer_indices", attending, supported)
    return layers - set(attending)


def _read_gated_delta(config: ConfigJson, layers: frozenset[int]) -> RecurrentConfig:
    return RecurrentConfig(
        kind="gated_delta",
        layers=layers,
        num_key_heads=config.integer("linear_num_key_heads", 16),
        num_heads=config.integer("linear_num_value_heads", 32),
        key_dim=config.integer("linear_key_head_dim", 128),
        value_dim=config.integer("linear_value_head_dim", 128),
        conv_width=config.integer("linear_conv_kernel_dim", 4, minimum=2),
    )


def _read_mamba2(config: ConfigJson, layers: frozenset[int], hidden_size: int) -> RecurrentConfig:
    num_heads = config.integer("mamba_n_heads", 128)
    inner = config.integer("mamba_expand", 2) * hidden_size
    if inner % num_heads:
        raise config.refusal("mamba_n_heads", num_heads, f"a divisor of mamba_expand times hidden_size, {inner}")
    width = config.value("mamba_d_head")
    if width not in (None, "auto", inner // num_heads):
        supported = f"mamba_expand times hidden_size over mamba_n_heads, {inner // num_heads}"
        raise config.refusal("mamba_d_head", width, supported)
    return RecurrentConfig(
        kind="mamba2",
        layers=layers,
        num_key_heads=config.integer("mamba_n_groups", 1),
        num_heads=num_heads,
        key_dim=config.integer("mamba_d_state", 256),
        value_dim=inner // num_heads,
        conv_width=config.integer("mamba_d_conv", 4, minimum=2),
        conv_bias=config.flag("mamba_conv_bias", True),
        bias=config.flag("mamba_proj_bias"),
        step_limits=_read_step_limits(config),
    )


def _read_step_limits(config: ConfigJson) -> tuple[float, float]:
    """Two numbers. transformers writes infinity, which JSON lacks, as an object."""
    value = config.value("time_step_limit")
    limits = [0.0, float("inf")] if value is None else value
    if isinstance(limits, list) and len(limits) == 2:
        low, high = (float("inf") if limit == {"__float__": "Infinity"} else limit for limit in limits)
        if all(isinstance(limit, int | float) and not isinstance(limit, bool) for limit in (low, high)) and low < high:
            return float(low), float(high)
    raise config.refusal("time_step_limit", value, "two numbers, the smaller one first")
