"""Norms of the residual stream and of attention heads."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quire.kernels import Kernels


class Norm(Protocol):
    """A norm over the last dimension [H]. Called with an update, it first adds it to the residual stream, in place."""

    @property
    def weight(self) -> Tensor | None:
        """[H]; None where nothing is normed."""
        ...

    @property
    def bias(self) -> Tensor | None: ...

    def __call__(self, residual: Tensor, update: Tensor | None = None) -> Tensor:
        """residual, update [T, H] -> [T, H]."""
        ...


class RMSNorm:
    """Divide each row by its root mean square, then multiply by the weight [H]."""

    __slots__ = ("bias", "eps", "kernels", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.weight = weight
        self.bias: Tensor | None = None
        self.eps = eps

    def __call__(self, residual: Tensor, update: Tensor | None = None) -> Tensor:
        if update is None:
            return self.kernels.rms_norm(residual, self.weight, self.eps)
        return self.kernels.add_rms_norm(update, residual, self.weight, self.eps)


class LayerNorm:
    """Shift each row to mean 0, scale it to variance 1, multiply by the weight [H] and add the bias [H], if any."""

    __slots__ = ("bias", "eps", "kernels", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.kernels = kernels
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, residual: Tensor, update: Tensor | None = None) -> Tensor:
        return self.kernels.layer_norm(residual, update, self.weight, self.bias, self.eps)


class NoNorm:
    """The residual stream itself, for families that norm only what is added to it."""

    weight: None = None
    bias: None = None

    def __call__(self, residual: Tensor, update: Tensor | None = None) -> Tensor:
        """The result is `residual`, not a copy."""
        if update is not None:
            residual += update
        return residual


class Normed(NamedTuple):
    """The norm of the residual stream, not yet computed: the layer that reads it may fuse the two.

    Read it once, since reading adds the update to the residual stream.
    """

    norm: Norm
    residual: Tensor
    update: Tensor | None

    def compute(self) -> Tensor:
        return self.norm(self.residual, self.update)


class HeadNorm(Protocol):
    """A norm of each head's query or key."""

    bound: Tensor
    """[heads or 1, D] float32: no element of a result has a larger magnitude."""

    def __call__(self, x: Tensor) -> None:
        """x [T, heads, D], overwritten."""
        ...


class RMSHeadNorm:
    """RMSNorm of each head with one weight [D] for all heads."""

    __slots__ = ("bound", "eps", "kernels", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.weight = weight
        self.eps = eps
        self.bound = _bound(weight)[None]

    def __call__(self, x: Tensor) -> None:
        self.kernels.rms_norm_heads_(x, self.weight, self.eps)


class LayerHeadNorm:
    """LayerNorm of each head, with a weight [heads, D] of its own for each, or one [1, D] for all; a bias likewise."""

    __slots__ = ("bias", "bound", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.bound = _bound(weight)
        if bias is not None:
            self.bound += bias.float().abs()

    def __call__(self, x: Tensor) -> None:
        normed = torch.layer_norm(x, x.shape[-1:], None, None, self.eps) * self.weight
        x.copy_(normed if self.bias is None else normed + self.bias)


class JointHeadNorm:
    """RMSNorm of all heads of a token as one vector, with a weight [heads x D]."""

    __slots__ = ("bound", "eps", "kernels", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float, head_dim: int) -> None:
        self.kernels = kernels
        self.weight = weight
        self.eps = eps
        self.bound = _bound(weight).view(-1, head_dim)

    def __call__(self, x: Tensor) -> None:
        self.kernels.rms_norm_heads_(x.flatten(1).unsqueeze(1), self.weight, self.eps)


def _bound(weight: Tensor) -> Tensor:
    """A normed row of D elements has length sqrt(D) at most, and so has each of its elements."""
    bound: Tensor = weight.float().abs() * weight.shape[-1] ** 0.5
    return bound
