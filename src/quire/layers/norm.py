"""Norms of the residual stream. Called with an update, they first add it to the stream, in place."""

import torch
from torch import Tensor

from quire.kernels import Kernels


class RMSNorm:
    """Each row divided by its root mean square, times the weight [H]."""

    __slots__ = ("eps", "kernels", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.weight = weight
        self.eps = eps

    def __call__(self, residual: Tensor, update: Tensor | None = None) -> Tensor:
        """residual, update [T, H] -> [T, H]."""
        if update is None:
            return self.kernels.rms_norm(residual, self.weight, self.eps)
        return self.kernels.add_rms_norm(update, residual, self.weight, self.eps)


class LayerNorm:
    """Each row shifted to mean 0 and scaled to variance 1, times the weight [H] plus the bias [H]."""

    __slots__ = ("bias", "eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, residual: Tensor, update: Tensor | None = None) -> Tensor:
        """residual, update [T, H] -> [T, H]."""
        if update is not None:
            residual += update
        return torch.layer_norm(residual, self.weight.shape, self.weight, self.bias, self.eps)
