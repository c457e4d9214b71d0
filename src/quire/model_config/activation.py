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
"""All names, with those that no kernel of experts computes."""


def read_activation(config: ConfigJson) -> str:
    """The activation of the MLPs. Raises `CheckpointError` for one that is not supported."""
    known = ACTIVATIONS if config.value("num_experts") else DENSE_ACTIVATIONS
    return known[config.choice("hidden_act", tuple(known), "silu")]
