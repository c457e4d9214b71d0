"""Activations of MLPs, as config.json names them."""

from quire.model_config.config_json import ConfigJson

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""config.json's name → ours."""


def read_activation(config: ConfigJson) -> str:
    return ACTIVATIONS[config.choice("hidden_act", tuple(ACTIVATIONS), "silu")]
