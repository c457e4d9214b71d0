"""Activations of MLPs, by the names of `ModelConfig.activation`."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from quire.kernels import Kernels

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """x [T, I] -> [T, I]."""
    return _PLAIN[name]


def gated_activation(kernels: Kernels, name: str) -> Callable[[Tensor], Tensor]:
    """x [T, 2 I] -> [T, I]: the activation of the first half times the second."""
    if name == "silu":
        return kernels.silu_and_mul
    return partial(kernels.gelu_and_mul, tanh=name == "gelu_tanh")
