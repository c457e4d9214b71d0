"""Activations of MLPs, as config.json names them."""

from quire.model_config.config_json import ConfigJson

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""config.json's name → ours."""
DENSE_ACTIVATIONS = {**ACTIVATIONS, **{name: name for name in ("quick_gelu", "mish", "tanh", "sigmoid", "linear")}}
"""Those that no kernel of experts computes are among them."""


def read_activation(config: ConfigJson, *, has_experts: bool) -> str:
    """The activation of the MLPs. Raises `CheckpointError` for one that is not supported."""
    known = ACTIVATIONS if has_experts else DENSE_ACTIVATIONS
    return known[config.choice("hidden_act", tuple(known), "silu")]
