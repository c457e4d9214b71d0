"""Draws against the plain float64 definition.

The draws take their uniform numbers as an argument, so the inverse CDF can be tried at evenly spaced ones: with N of
them, every token must come up within one of N times its probability, which is far sharper than any random test.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.sampling.draws import MinP, draw_top_k, draw_top_p, draw_unfiltered

NUM_DRAWS = 4000
EVEN = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS


def make_scores(vocab_size: int, spread: float, seed: int) -> torch.Tensor:
    scores = np.random.default_rng(seed).normal(scale=spread, size=vocab_size).astype(np.float32)
    return torch.from_numpy(scores - scores.max())


def plain_probabilities(scores: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The definition: min_p, then the top k, then the fewest that hold top_p of what is left."""
    weights = np.exp(scores.numpy().astype(np.float64))
    order = np.argsort(-weights, kind="stable")
    kept = order[weights[order] >= np.float32(min_p)]
    if top_k:
        kept = kept[:top_k]
    cumulative = weights[kept].cumsum()
    kept = kept[: 1 + int(np.sum(cumulative < top_p * cumulative[-1] * (1 - 1e-9)))]
    probabilities = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def assert_matches(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert (counts[probabilities == 0] == 0).all()
    np.testing.assert_allclose(counts, NUM_DRAWS * probabilities, atol=1.5)


def repeated(scores: torch.Tensor) -> torch.Tensor:
    return scores.repeat(NUM_DRAWS, 1)


def each(value: float) -> np.ndarray:
    return np.full(NUM_DRAWS, value)


def min_ps(min_p: float) -> MinP:
    return each(min_p).astype(np.float32) if min_p else None


@settings(max_examples=25)
@given(
    vocab_size=st.sampled_from([1, 2, 37, 256, 257, 700]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_unfiltered(vocab_size: int, spread: float, min_p: float, seed: int) -> None:
    scores = make_scores(vocab_size, spread, seed)
    assert_matches(draw_unfiltered(repeated(scores), min_ps(min_p), EVEN), plain_probabilities(scores, min_p=min_p))


@settings(max_examples=25)
@given(
    vocab_size=st.sampled_from([2, 37, 700]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    top_k=st.sampled_from([1, 2, 20, 64, 65, 300]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_k(vocab_size: int, spread: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    scores = make_scores(vocab_size, spread, seed)
    top_k = min(top_k, vocab_size)
    tokens = draw_top_k(repeated(scores), min_ps(min_p), np.full(NUM_DRAWS, top_k, dtype=np.int64), each(top_p), EVEN)
    assert_matches(tokens, plain_probabilities(scores, top_k, top_p, min_p))


@settings(max_examples=25)
@given(
    vocab_size=st.sampled_from([1, 2, 37, 65, 700]),
    spread=st.sampled_from([0.0, 0.01, 0.5, 3.0, 30.0]),
    top_p=st.sampled_from([0.999999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_p(vocab_size: int, spread: float, top_p: float, min_p: float, seed: int) -> None:
    scores = make_scores(vocab_size, spread, seed)
    tokens = draw_top_p(repeated(scores), min_ps(min_p), each(top_p), EVEN)
    # Rounding may move the end of the nucleus by a token where probabilities are as good as tied with the limit.
    expected = [plain_probabilities(scores, 0, p, min_p) for p in (top_p, top_p * (1 - 1e-6), top_p * (1 + 1e-6))]
    counts = np.bincount(tokens, minlength=vocab_size)
    assert any(np.allclose(counts, NUM_DRAWS * p, atol=1.5) and not counts[p == 0].any() for p in expected)


@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_top_p_of_a_large_flat_vocabulary(top_p: float) -> None:
    """The nucleus has tens of thousands of tokens: the buckets do it, token by token as a sort would."""
    scores = make_scores(40_000, 1.0, seed=5)
    order = np.argsort(-scores.numpy(), kind="stable")
    weights = np.exp(scores.numpy().astype(np.float64))
    cumulative = weights[order].cumsum()
    size = 1 + int(np.sum(cumulative < top_p * cumulative[-1]))
    uniform = np.array([0.0, 0.1, 0.5, 0.9, 0.9999, 1 - 2.0**-53])
    tokens = draw_top_p(scores.repeat(len(uniform), 1), None, np.full(len(uniform), top_p), uniform)
    expected = np.searchsorted(cumulative, uniform * cumulative[size - 1], side="right")
    places = np.argsort(order)[tokens]
    assert abs(places - np.minimum(expected, size - 1)).max() <= 2


def test_equal_probabilities_keep_the_lowest_ids() -> None:
    scores = torch.zeros(1, 1000)
    last = np.array([1 - 2.0**-53])
    assert draw_top_p(scores.clone(), None, np.array([0.5]), last) == [499]
    assert draw_top_k(scores.clone(), None, np.array([10]), np.array([1.0]), last) == [9]
    assert draw_top_k(scores.clone(), None, np.array([10]), np.array([0.5]), last) == [4]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_tokens_without_probability_are_not_drawn_at_either_end(uniform: float) -> None:
    scores = torch.full((1, 1000), -torch.inf)
    scores[0, 400:410] = 0.0
    ends = np.array([uniform])
    expected = [400] if uniform == 0.0 else [409]
    assert draw_unfiltered(scores.clone(), None, ends) == expected
    assert draw_top_k(scores.clone(), None, np.array([50]), np.array([1.0]), ends) == expected
    assert draw_top_p(scores.clone(), None, np.array([0.999]), ends) == expected
    assert draw_top_p(scores.clone(), np.array([0.5], np.float32), np.array([0.999]), ends) == expected


def test_the_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should() -> None:
    """One likely token, then 151,935 of 2e-8 each: together 0.3 %, which a running float32 sum never sees."""
    vocab_size, tail = 151_936, np.float32(2e-8)
    weights = np.full(vocab_size, tail)
    weights[0] = 1.0
    assert weights.cumsum()[-1] == 1.0, "this is what a float32 sum makes of it"
    tail_mass = (vocab_size - 1) * float(tail)
    uniform = np.linspace(0.0, 1.0, 16, endpoint=False)
    in_tail = (1.0 + uniform * tail_mass) / (1.0 + tail_mass)
    scores = torch.from_numpy(np.log(weights)).repeat(16, 1)
    tokens = draw_unfiltered(scores, None, in_tail)
    np.testing.assert_allclose(tokens / vocab_size, uniform, atol=1e-4)
    assert draw_unfiltered(torch.from_numpy(np.log(weights))[None], None, np.array([0.9969])) == [0]
