"""Routers: which experts a token is sent to, and what weighs their outputs. T tokens, E experts, K of them active."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quire.model_config import ModelConfig
from quire.models.weights import WeightScope


class Router(Protocol):
    """Chooses experts by the logits of a dense layer. A token's choice depends on its own logits alone."""

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, E] float32 -> the weights of the chosen experts and their indices, [T, K] each."""
        ...


def row_sigmoid(x: Tensor) -> Tensor:
    """The sigmoid, the same bits in every batch: torch's own rounds a tensor's last elements in another way."""
    return torch.softmax(torch.stack((x, torch.zeros_like(x)), dim=-1), dim=-1)[..., 0]


class SoftmaxTopK:
    """The experts of the largest softmax over all (Mixtral, Qwen-MoE)."""

    def __init__(self, num_active: int, *, normalise: bool) -> None:
        """`normalise`: the probabilities of a token's experts are divided by their sum."""
        self.num_active = num_active
        self.normalise = normalise

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = torch.softmax(logits, dim=-1).topk(self.num_active, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen


class BiasedSoftmax:
    """The experts of the largest softmax plus bias, which weigh by the softmax alone, divided by its sum over them
    (ERNIE 4.5)."""

    def __init__(self, bias: Tensor, num_active: int) -> None:
        """bias [E] float32 moves the choice only."""
        self.bias = bias
        self.num_active = num_active

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.softmax(logits, dim=-1)
        chosen = (shares + self.bias).topk(self.num_active, dim=-1).indices
        weights = shares.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True), chosen


class TopKSoftmax:
    """The experts of the largest logits, weighed by the softmax over these alone (Granite-MoE)."""

    def __init__(self, num_active: int) -> None:
        self.num_active = num_active

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        largest, chosen = logits.topk(self.num_active, dim=-1)
        return torch.softmax(largest, dim=-1), chosen


class GroupedSigmoid:
    """The experts of the largest sigmoid plus bias, which weigh by the sigmoid alone (DeepSeek-V3, GLM-4.5).

    Experts lie in groups of one size. A group counts as the sum of its two best experts, and only experts of the best
    groups are chosen.
    """

    def __init__(
        self,
        bias: Tensor,
        num_active: int,
        *,
        normalise: bool,
        scale: float = 1.0,
        num_groups: int = 1,
        num_active_groups: int = 1,
    ) -> None:
        """bias [E] float32 moves the choice only. `scale` multiplies the weights, after the division by their sum."""
        self.bias = bias
        self.num_active = num_active
        self.normalise = normalise
        self.scale = scale
        self.num_groups = num_groups
        self.num_active_groups = num_active_groups

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = row_sigmoid(logits)
        ranks = scores + self.bias
        if self.num_active_groups < self.num_groups:
            ranks = self._in_best_groups(ranks)
        chosen = ranks.topk(self.num_active, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def _in_best_groups(self, ranks: Tensor) -> Tensor:
        """ranks [T, E] -> the same, -inf outside the best groups."""
        groups: Tensor = ranks.unflatten(1, (self.num_groups, -1))
        best_two = groups.topk(2, dim=-1).values.sum(-1)
        return keep_groups(groups, best_two, self.num_active_groups, outside=-torch.inf)


class GroupedSoftmax:
    """The experts of the largest softmax over all, of the groups with the largest one (DeepSeek-V2)."""

    def __init__(self, num_active: int, *, scale: float = 1.0, num_groups: int = 1, num_active_groups: int = 1) -> None:
        """Experts lie in groups of one size. `scale` multiplies the weights."""
        self.num_active = num_active
        self.scale = scale
        self.num_groups = num_groups
        self.num_active_groups = num_active_groups

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.softmax(logits, dim=-1)
        if self.num_active_groups < self.num_groups:
            groups = shares.unflatten(1, (self.num_groups, -1))
            shares = keep_groups(groups, groups.amax(-1), self.num_active_groups, outside=0.0)
        weights, chosen = shares.topk(self.num_active, dim=-1)
        return weights * self.scale, chosen


def keep_groups(groups: Tensor, ranks: Tensor, num_kept: int, *, outside: float) -> Tensor:
    """groups [T, G, E / G], ranks [T, G] -> [T, E]: `outside` in the place of all but the groups of largest rank."""
    best = ranks.topk(num_kept, dim=-1).indices
    dropped = torch.ones(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter_(1, best, False)
    kept: Tensor = groups.masked_fill(dropped.unsqueeze(-1), outside)
    return kept.flatten(1)


class SparseMixer:
    """Two experts, one after the other: each the largest logit left, weighed by the softmax over the logits near it
    (Phi-3.5-MoE)."""

    num_active = 2

    def __init__(self, jitter: float) -> None:
        """A logit is near the largest one if it is below it by at most 2 * `jitter`, relative to the larger of the
        largest logit and its own magnitude."""
        self.jitter = jitter

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        first_weight, first = self._choose(logits, logits)
        second_weight, second = self._choose(logits, logits.scatter(1, first, -torch.inf))
        return torch.cat((first_weight, second_weight), dim=1), torch.cat((first, second), dim=1)

    def _choose(self, logits: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """`left` is `logits` with -inf for what is taken. Weight and index of the largest, [T, 1] each."""
        largest, chosen = left.max(dim=1, keepdim=True)
        far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * self.jitter
        return torch.softmax(left.masked_fill(far, -torch.inf), dim=1).gather(1, chosen), chosen


def make_router(config: ModelConfig, weights: WeightScope) -> Router:
    """The router that a config names. `weights` is the scope of the router's dense layer."""
    return _MAKERS[config.router.kind](config, weights)


def _grouped_sigmoid(config: ModelConfig, weights: WeightScope) -> Router:
    return GroupedSigmoid(
        weights.take("e_score_correction_bias", (config.num_experts,)).float(),
        config.num_experts_per_token,
        normalise=config.norm_topk,
        scale=config.router.scale,
        num_groups=config.router.num_groups,
        num_active_groups=config.router.num_active_groups,
    )


_MAKERS: dict[str, Callable[[ModelConfig, WeightScope], Router]] = {
    "softmax_topk": lambda config, _: SoftmaxTopK(config.num_experts_per_token, normalise=config.norm_topk),
    "biased_softmax": lambda config, weights: BiasedSoftmax(
        weights.take("e_score_correction_bias", (1, config.num_experts))[0].float(), config.num_experts_per_token
    ),
    "topk_softmax": lambda config, _: TopKSoftmax(config.num_experts_per_token),
    "grouped_sigmoid": _grouped_sigmoid,
    "grouped_softmax": lambda config, _: GroupedSoftmax(
        config.num_experts_per_token,
        scale=config.router.scale,
        num_groups=config.router.num_groups,
        num_active_groups=config.router.num_active_groups,
    ),
    "sparse_mixer": lambda config, _: SparseMixer(config.router.jitter),
}
