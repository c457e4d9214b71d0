"""Activations of MLPs, by the names of `ModelConfig.activation`."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square_(),
}
FUSED_GATES = frozenset({"silu", "gelu", "gelu_tanh"})
"""Activations that `Kernels.glu_linear` computes."""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """x [T, I] -> [T, I]."""
    return _FUNCTIONS[name]
