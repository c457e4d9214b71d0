"""Experts: a mixture of MLPs in the place of one. T tokens, H hidden size, E experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.layers.linear import Linear
from quire.layers.norm import Normed
from quire.models.blocks import GatedMLP
from quire.models.routers import Router, row_sigmoid


class Experts:
    """A router sends each token to some of the experts and weighs their outputs; a shared MLP, if any, sees them all.

    Tokens are sorted by expert, and each expert computes its tokens in one product. A token's outputs are summed in the
    order of the experts, so its result does not depend on the other tokens of the step.
    """

    def __init__(
        self, logits: Linear, router: Router, experts: Sequence[GatedMLP], *, shared: GatedMLP | None = None
    ) -> None:
        """`logits` [H] -> [E], or [E + 1] with `shared`: the last output is the gate whose sigmoid multiplies the
        shared MLP's output."""
        self.logits = logits
        self.router = router
        self.experts = list(experts)
        self.shared = shared

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """x [T, H] -> [T, H]."""
        if isinstance(x, Normed):
            x = x.compute()
        logits = self.logits(x)
        weights, chosen = self.router(logits[:, : len(self.experts)].float())  # [T, num_active]
        expert_of_pair, order = chosen.flatten().sort(stable=True)
        token_of_pair = order // chosen.shape[1]
        weight_of_pair = weights.flatten()[order].unsqueeze(1).to(x.dtype)
        inputs = x[token_of_pair]
        counts = torch.bincount(expert_of_pair, minlength=len(self.experts)).tolist()
        out = self._shared(x, logits)
        first = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                pairs = slice(first, first + count)
                out.index_add_(0, token_of_pair[pairs], expert(inputs[pairs]).mul_(weight_of_pair[pairs]))
                first += count
        return out

    def _shared(self, x: Tensor, logits: Tensor) -> Tensor:
        """[T, H]: what the experts' outputs are added to."""
        if self.shared is None:
            return torch.zeros_like(x)
        out = self.shared(x)
        if logits.shape[1] > len(self.experts):
            out *= row_sigmoid(logits[:, len(self.experts) :])
        return out
