"""Routers choose and weigh what a loop in plain Python does."""

import math

import pytest
import torch
from torch import Tensor

from quire.models.routers import GroupedSigmoid, Router, SoftmaxTopK, SparseMixer, TopKSoftmax


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: -values[index])[:count]


def weights_of(router: Router, logits: Tensor) -> list[dict[int, float]]:
    """What each token's experts weigh."""
    weights, chosen = router(logits)
    assert weights.shape == chosen.shape
    return [dict(zip(*pair, strict=True)) for pair in zip(chosen.tolist(), weights.tolist(), strict=True)]


def random_logits(num_experts: int) -> Tensor:
    return torch.randn(40, num_experts, generator=torch.Generator().manual_seed(num_experts)) * 2


def check(router: Router, logits: Tensor, expected: list[dict[int, float]]) -> None:
    found = weights_of(router, logits)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for row, alone in zip(logits.split(1), found, strict=True):
        assert weights_of(router, row) == [alone]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "num_active"), [(8, 2), (5, 5), (7, 1)])
def test_softmax_over_all(num_experts: int, num_active: int, normalise: bool) -> None:
    logits = random_logits(num_experts)
    expected = []
    for row in logits.tolist():
        shares = softmax(row)
        chosen = best(row, num_active)
        total = sum(shares[index] for index in chosen) if normalise else 1.0
        expected.append({index: shares[index] / total for index in chosen})
    check(SoftmaxTopK(num_active, normalise=normalise), logits, expected)


def test_softmax_over_the_chosen() -> None:
    logits = random_logits(9)
    expected = []
    for row in logits.tolist():
        chosen = best(row, 3)
        expected.append(dict(zip(chosen, softmax([row[index] for index in chosen]), strict=True)))
    check(TopKSoftmax(3), logits, expected)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_groups", "num_active_groups"), [(1, 1), (4, 2), (4, 4), (6, 1)])
def test_sigmoid_with_a_bias_of_the_choice(num_groups: int, num_active_groups: int, normalise: bool) -> None:
    logits = random_logits(12)
    bias = torch.linspace(-0.5, 0.5, 12)
    router = GroupedSigmoid(
        bias, 2, normalise=normalise, scale=2.5, num_groups=num_groups, num_active_groups=num_active_groups
    )
    size = 12 // num_groups
    expected = []
    for row in logits.tolist():
        scores = [1 / (1 + math.exp(-value)) for value in row]
        ranks = [score + moved for score, moved in zip(scores, bias.tolist(), strict=True)]
        groups = [sum(sorted(ranks[first : first + size])[-2:]) for first in range(0, 12, size)]
        allowed = best(groups, num_active_groups)
        chosen = best([rank if index // size in allowed else -1 for index, rank in enumerate(ranks)], 2)
        total = sum(scores[index] for index in chosen) if normalise else 1.0
        expected.append({index: 2.5 * scores[index] / total for index in chosen})
    check(router, logits, expected)


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_sparse_mixer(jitter: float) -> None:
    logits = random_logits(6)
    expected = []
    for row in logits.tolist():
        left, weights = dict(enumerate(row)), {}
        for _ in range(2):
            index = max(left, key=lambda each: left[each])
            largest = left[index]
            near = [x for x in left.values() if (largest - x) / max(abs(x), largest) <= 2 * jitter]
            weights[index] = math.exp(largest) / sum(map(math.exp, near))
            del left[index]
        expected.append(weights)
    check(SparseMixer(jitter), logits, expected)
