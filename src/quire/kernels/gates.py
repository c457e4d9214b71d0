"""Gates of MLPs in plain PyTorch, by name."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from quire.model_config import ClampedSwiGLU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def gated(x: Tensor, gate: str | ClampedSwiGLU) -> Tensor:
    """x [T, 2 I], gate and up side by side -> [T, I]: activation(gate) * up, or what `gate` says."""
    first, up = x.chunk(2, dim=1)
    if isinstance(gate, str):
        return ACTIVATIONS[gate](first) * up
    first = first.clamp(max=gate.limit)
    return first * functional.sigmoid(first * gate.alpha) * (up.clamp(-gate.limit, gate.limit) + 1)
