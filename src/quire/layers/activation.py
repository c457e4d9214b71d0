"""Activations of MLPs, by the names of `ModelConfig.activation`."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """x [T, I] -> [T, I]."""
    return _PLAIN[name]
