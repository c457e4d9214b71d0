"""Draws against the plain float64 definition.

The draws take their uniform numbers as an argument, so the inverse CDF can be tried at evenly spaced ones: with N of
them, every token must come up within one of N times its probability, which is far sharper than any random test.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.kernels import cpu, reference

NUM_DRAWS = 4000
EVEN = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS


EXAMPLES = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=cpu.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)


def draw(
    logits: torch.Tensor,
    uniform: np.ndarray,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    kernel: Callable[..., None] = cpu.sample_tokens,
) -> np.ndarray:
    """Tokens of one row of logits, one for each uniform number."""
    num_draws = len(uniform)
    peaks, ids = torch.empty(num_draws), torch.empty(num_draws, dtype=torch.int32)
    kernel(
        logits.expand(num_draws, -1).contiguous(),
        torch.full((num_draws,), temperature),
        torch.full((num_draws,), min_p),
        torch.full((num_draws,), top_k, dtype=torch.int32),
        torch.full((num_draws,), top_p, dtype=torch.float64),
        torch.from_numpy(uniform),
        peaks,
        ids,
    )
    assert (peaks == logits.max()).all()
    return ids.numpy()


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


@EXAMPLES
@given(
    vocab_size=st.sampled_from([1, 2, 37, 256, 257, 700]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_unfiltered(vocab_size: int, spread: float, min_p: float, seed: int) -> None:
    scores = make_scores(vocab_size, spread, seed)
    assert_matches(draw(scores, EVEN, min_p=min_p), plain_probabilities(scores, min_p=min_p))


@EXAMPLES
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
    assert_matches_one_of(
        draw(scores, EVEN, top_k=top_k, top_p=top_p, min_p=min_p),
        [plain_probabilities(scores, top_k, p, min_p) for p in as_good_as(top_p)],
    )


@EXAMPLES
@given(
    vocab_size=st.sampled_from([1, 2, 37, 65, 700]),
    spread=st.sampled_from([0.0, 0.01, 0.5, 3.0, 30.0]),
    top_p=st.sampled_from([0.999999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_p(vocab_size: int, spread: float, top_p: float, min_p: float, seed: int) -> None:
    scores = make_scores(vocab_size, spread, seed)
    assert_matches_one_of(
        draw(scores, EVEN, top_p=top_p, min_p=min_p),
        [plain_probabilities(scores, 0, p, min_p) for p in as_good_as(top_p)],
    )


def as_good_as(top_p: float) -> list[float]:
    """Rounding may move the end of the nucleus by a token where probabilities are as good as tied with the limit."""
    return [top_p, top_p * (1 - 1e-6), min(1.0, top_p * (1 + 1e-6))]


def assert_matches_one_of(tokens: np.ndarray, probabilities: list[np.ndarray]) -> None:
    counts = np.bincount(tokens, minlength=len(probabilities[0]))
    assert any(np.allclose(counts, NUM_DRAWS * p, atol=1.5) and not counts[p == 0].any() for p in probabilities)


@pytest.mark.parametrize("top_p", [0.3, 0.95])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 20, 7000, 50_000])
def test_a_large_vocabulary(top_p: float, spread: float, top_k: int) -> None:
    """The nucleus may have tens of thousands of tokens, and a bucket, too: token by token as a sort would."""
    scores = make_scores(40_000, spread, seed=5)
    order = np.argsort(-scores.numpy(), kind="stable")[: top_k or None]
    weights = np.exp(scores.numpy().astype(np.float64))
    cumulative = weights[order].cumsum()
    size = 1 + int(np.sum(cumulative < top_p * cumulative[-1]))
    uniform = np.array([0.0, 0.1, 0.5, 0.9, 0.9999, 1 - 2.0**-53])
    expected = np.searchsorted(cumulative, uniform * cumulative[size - 1], side="right")
    tokens = draw(scores, uniform, top_k=top_k, top_p=top_p)
    places = np.argsort(np.argsort(-scores.numpy(), kind="stable"))[tokens]
    assert abs(places - np.minimum(expected, size - 1)).max() <= 2


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 20.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.8), (12, 1.0), (12, 0.8)])
def test_temperature_and_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    logits = make_scores(500, 3.0, seed=2) + 17.0
    options = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "min_p": 0.001}
    uniform = (np.arange(100) + 0.5) / 100
    assert (draw(logits, uniform, **options) == draw(logits, uniform, **options, kernel=reference.sample_tokens)).all()


def test_rows_are_drawn_by_their_own_limits_whatever_is_beside_them() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = 23
    logits = 3 * torch.randn(rows, 2 * 3001, generator=generator)[:, :3001]
    limits = (
        torch.rand(rows, generator=generator) + 0.5,
        torch.tensor([0.0, 0.01]).repeat(rows)[:rows].contiguous(),
        torch.tensor([0, 1, 40, 5000], dtype=torch.int32).repeat(rows)[:rows].contiguous(),
        torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64).repeat(rows)[:rows].contiguous(),
        torch.rand(rows, generator=generator, dtype=torch.float64),
    )
    peaks, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
    cpu.sample_tokens(logits, *limits, peaks, ids)
    own_peaks, own_ids = torch.empty(1), torch.empty(1, dtype=torch.int32)
    for row in range(rows):
        cpu.sample_tokens(logits[row : row + 1], *(limit[row : row + 1] for limit in limits), own_peaks, own_ids)
        assert (own_ids, own_peaks) == (ids[row], peaks[row])
    expected = torch.empty_like(ids)
    reference.sample_tokens(logits, *limits, peaks, expected)
    assert torch.equal(ids, expected)


def test_equal_probabilities_keep_the_lowest_ids() -> None:
    scores, last = torch.zeros(1000), np.array([1 - 2.0**-53])
    assert draw(scores, last, top_p=0.5) == [499]
    assert draw(scores, last, top_k=10) == [9]
    assert draw(scores, last, top_k=10, top_p=0.5) == [4]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_tokens_without_probability_are_not_drawn_at_either_end(uniform: float) -> None:
    scores = torch.full((1000,), -torch.inf)
    scores[400:410] = 0.0
    ends = np.array([uniform])
    expected = [400] if uniform == 0.0 else [409]
    assert draw(scores, ends) == expected
    assert draw(scores, ends, top_k=50) == expected
    assert draw(scores, ends, top_p=0.999) == expected
    assert draw(scores, ends, top_p=0.999, min_p=0.5) == expected


def test_rows_that_are_not_finite_do_not_touch_their_neighbours() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.zeros(5, 300)
    logits[0], logits[1, 7], logits[2, 299], logits[3] = -inf, nan, inf, nan
    ones, peaks, ids = torch.ones(5), torch.empty(5), torch.empty(5, dtype=torch.int32)
    tops, halves = torch.ones(5, dtype=torch.float64), torch.full((5,), 0.5, dtype=torch.float64)
    for top_k in (0, 10):
        limits = ones, torch.zeros(5), torch.full((5,), top_k, dtype=torch.int32), tops
        cpu.sample_tokens(logits, *limits, halves, peaks, ids)
        torch.testing.assert_close(peaks, torch.tensor([-inf, nan, inf, nan, 0.0]), equal_nan=True)
        assert ids[4] == (150 if not top_k else 5)
        assert ((ids >= 0) & (ids < 300)).all()


def test_the_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should() -> None:
    """One likely token, then 151,935 of 2e-8 each: together 0.3 %, which a running float32 sum never sees."""
    vocab_size, tail = 151_936, np.float32(2e-8)
    weights = np.full(vocab_size, tail)
    weights[0] = 1.0
    assert weights.cumsum()[-1] == 1.0, "this is what a float32 sum makes of it"
    tail_mass = (vocab_size - 1) * float(tail)
    uniform = np.linspace(0.0, 1.0, 16, endpoint=False)
    in_tail = (1.0 + uniform * tail_mass) / (1.0 + tail_mass)
    scores = torch.from_numpy(np.log(weights))
    np.testing.assert_allclose(draw(scores, in_tail) / vocab_size, uniform, atol=1e-4)
    assert draw(scores, np.array([0.9969])) == [0]


@pytest.mark.parametrize("name", ["temperatures", "min_p", "top_k", "top_p", "uniforms", "peaks", "ids"])
def test_arguments_are_checked(name: str) -> None:
    f64, i32 = torch.float64, torch.int32
    arguments = {
        "temperatures": torch.ones(2),
        "min_p": torch.zeros(2),
        "top_k": torch.zeros(2, dtype=i32),
        "top_p": torch.ones(2, dtype=f64),
        "uniforms": torch.zeros(2, dtype=f64),
        "peaks": torch.empty(2),
        "ids": torch.empty(2, dtype=i32),
    }
    with pytest.raises(ValueError, match=f"^{name}"):
        cpu.sample_tokens(torch.zeros(2, 3), **arguments | {name: arguments[name][:1]})
    with pytest.raises(ValueError, match=f"^{name}"):
        cpu.sample_tokens(torch.zeros(2, 3), **arguments | {name: arguments[name].half()})
