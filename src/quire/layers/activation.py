"""Activations of MLPs, by the names of `ModelConfig.activation`."""

from collections.abc import Callable

from torch import Tensor

from quire.kernels.gates import ACTIVATIONS

FUSED_GATES = frozenset({"silu", "gelu", "gelu_tanh"})
"""Activations that `Kernels.glu_linear` computes."""
FUSED_ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh", "relu", "relu2"})
"""Activations that `Kernels.activation_linear` computes."""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """x [T, I] -> [T, I]."""
    return ACTIVATIONS[name]
