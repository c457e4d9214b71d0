"""Gated activations of MLPs, by name, for kernels in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""gpt-oss: factor inside the sigmoid, and the largest magnitude of what is multiplied."""


def gated(x: Tensor, activation: str) -> Tensor:
    """x [T, 2 I] -> [T, I]: the activation of the first half times the second. clamped_swiglu clamps both halves and
    adds 1 to the second."""
    gate, up = x.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": functional.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
    "relu2": lambda x: functional.relu(x).square(),
}
