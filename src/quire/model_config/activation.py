"""Activations of MLPs, as config.json names them."""

from dataclasses import dataclass

from quire.model_config.config_json import ConfigJson

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""config.json's name → ours."""
GATES = ("clamped_swiglu",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiGLU:
    """gate * sigmoid(alpha * gate) * (up + 1), with gate at most `limit` and up between -`limit` and `limit`."""

    alpha: float = 1.702
    limit: float = 7.0


def read_activation(config: ConfigJson) -> str:
    return ACTIVATIONS[config.choice("hidden_act", tuple(ACTIVATIONS), "silu")]


def read_gate(config: ConfigJson) -> ClampedSwiGLU | None:
    """The gate of a family that has one of its own."""
    if config.value("gate") is None:
        return None
    config.choice("gate", GATES)
    return ClampedSwiGLU(alpha=config.number("swiglu_alpha", 1.702), limit=config.number("swiglu_limit", 7.0))
