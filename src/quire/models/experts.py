"""Experts: a mixture of MLPs in the place of one. T tokens, H hidden size, E experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.layers.linear import Linear
from quire.layers.norm import Normed
from quire.models.blocks import GatedMLP


class Experts:
    """A router sends each token to the `num_active` experts of the largest probability, which weighs their outputs.

    Tokens are sorted by expert, and each expert computes its tokens in one product. A token's outputs are summed in the
    order of the experts, so its result does not depend on the other tokens of the step.
    """

    def __init__(self, router: Linear, experts: Sequence[GatedMLP], num_active: int, *, normalise: bool) -> None:
        """`normalise`: the probabilities of a token's experts are divided by their sum."""
        self.router = router
        self.experts = list(experts)
        self.num_active = num_active
        self.normalise = normalise

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """x [T, H] -> [T, H]."""
        if isinstance(x, Normed):
            x = x.compute()
        probabilities = torch.softmax(self.router(x), dim=-1, dtype=torch.float32)  # [T, E]
        shares, chosen = probabilities.topk(self.num_active, dim=-1)  # [T, num_active]
        if self.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        expert_of_pair, order = chosen.flatten().sort(stable=True)
        token_of_pair = order // self.num_active
        share_of_pair = shares.flatten()[order].unsqueeze(1).to(x.dtype)
        inputs = x[token_of_pair]
        counts = torch.bincount(expert_of_pair, minlength=len(self.experts)).tolist()
        out = torch.zeros_like(x)
        first = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                pairs = slice(first, first + count)
                out.index_add_(0, token_of_pair[pairs], expert(inputs[pairs]).mul_(share_of_pair[pairs]))
                first += count
        return out
