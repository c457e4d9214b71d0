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


def read_activation(config: ConfigJson) -> str:
    return ACTIVATIONS[config.choice("hidden_act", tuple(ACTIVATIONS), "silu")]
