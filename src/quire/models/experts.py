"""Experts: a mixture of MLPs in the place of one. T tokens, H hidden size, E experts."""

import torch
from torch import Tensor

from quire.layers.experts import ExpertMLPs
from quire.layers.linear import Linear
from quire.layers.norm import Normed
from quire.models.blocks import GatedMLP
from quire.models.routers import Router, row_sigmoid


class Experts:
    """A router sends each token to some of the experts and weighs their outputs; a shared MLP, if any, sees them all.

    A token's result does not depend on the other tokens of the step.
    """

    def __init__(self, logits: Linear, router: Router, experts: ExpertMLPs, *, shared: GatedMLP | None = None) -> None:
        """`logits` [H] -> [E], or [E + 1] with `shared`: the last output is the gate whose sigmoid multiplies the
        shared MLP's output."""
        self.logits = logits
        self.router = router
        self.experts = experts
        self.num_experts = experts.packed.num_experts
        self.shared = shared

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """x [T, H] -> [T, H]."""
        if isinstance(x, Normed):
            x = x.compute()
        logits = self.logits(x)
        weights, chosen = self.router(logits[:, : self.num_experts].float())  # [T, A]
        out = self._shared(x, logits)
        self.experts.add_to(out, x, weights, chosen)
        return out

    def _shared(self, x: Tensor, logits: Tensor) -> Tensor:
        """[T, H]: what the experts' outputs are added to."""
        if self.shared is None:
            return torch.zeros_like(x)
        out = self.shared(x)
        if logits.shape[1] > self.num_experts:
            out *= row_sigmoid(logits[:, self.num_experts :])
        return out
