"""The sampler as the runner uses it: distributions, seeds, isolation of faults, logprobs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quire.kernels import Kernels, cpu
from quire.sampling import Sampler, SampleResult, SamplingState
from quire.sampling.batch import SamplingBatch
from quire.sampling_params import SamplingParams
from quire.step import logprob_bytes

STOP = (2,)
ROOM = 2**26
"""Bytes for log-probabilities."""


def make_states(params: Sequence[SamplingParams], vocab_size: int, seed: int = 0) -> list[SamplingState]:
    return [
        SamplingState(p, [1], [], seed if p.seed is None else p.seed, index, STOP, vocab_size)
        for index, p in enumerate(params)
    ]


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], seed: int = 0) -> SampleResult:
    vocab_size = logits.shape[1]
    return Sampler(vocab_size, ROOM, cpu).sample(logits.clone(), make_states(params, vocab_size, seed))


def plain_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The definition of the filters, in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities[probabilities < params.min_p] = 0.0
    order = np.argsort(-probabilities, kind="stable")
    if params.top_k > 0:
        probabilities[order[params.top_k :]] = 0.0
    probabilities /= probabilities.sum()
    before = probabilities[order].cumsum() - probabilities[order]
    probabilities[order[before >= params.top_p]] = 0.0
    return np.asarray(probabilities / probabilities.sum())


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=12, top_p=0.7, min_p=0.05, temperature=1.3),
    SamplingParams(top_p=0.9, min_p=0.02, temperature=2.0),
]


def test_whole_numbers_are_as_good_as_others() -> None:
    """A client that writes temperature=1 sends an int."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    whole = [SamplingParams(temperature=2, top_p=1, min_p=0), SamplingParams(temperature=1), SamplingParams(min_p=1)]
    fractional = [SamplingParams(temperature=2.0), SamplingParams(temperature=1.0), SamplingParams(min_p=1.0)]
    for params, same in zip(whole, fractional, strict=True):
        assert sample(logits, 3 * [params]).token_ids == sample(logits, 3 * [same]).token_ids


@pytest.mark.parametrize("vocab_size", [40, 400])
def test_a_mixed_batch_draws_from_the_distributions_asked_for(vocab_size: int) -> None:
    num_draws = 8000
    logits = torch.randn(len(MIXED), vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    # Interleaved, so that every group is scattered over the batch; samples of one seed differ by their index.
    tokens = np.array(sample(logits.repeat(num_draws, 1), MIXED * num_draws, seed=11).token_ids)
    for row, params in enumerate(MIXED):
        expected = plain_probabilities(logits[row].numpy(), params) * num_draws
        counts = np.bincount(tokens[row :: len(MIXED)], minlength=vocab_size)
        assert counts[expected == 0].sum() == 0
        # Chi-square wants at least 5 of each; the rarer tokens count as one.
        rare = (expected < 5) & (expected > 0)
        observed = np.append(counts[expected >= 5], counts[rare].sum())
        wanted = np.append(expected[expected >= 5], expected[rare].sum())
        if wanted[-1] < 5:
            observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
        assert stats.chisquare(observed, wanted).pvalue > 1e-4, params


def test_greedy_takes_the_lowest_id_among_equals_and_ignores_filters() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]]).repeat(3, 1)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=1.0),
        SamplingParams(temperature=0, logit_bias={3: 0.5}),
    ]
    assert sample(logits, params).token_ids == [1, 1, 3]


def test_a_tiny_temperature_is_nearly_greedy_without_overflow() -> None:
    logits = torch.tensor([[1e4, 3e4, 3e4 - 1.0]])
    result = sample(logits.repeat(50, 1), [SamplingParams(temperature=1e-5)] * 50)
    assert result.token_ids == [1] * 50
    assert result.errors == [None] * 50


def test_a_tiny_temperature_keeps_small_differences() -> None:
    # Dividing first would round both logits to multiples of 4; the difference of 1 after scaling must survive.
    logits = torch.tensor([[1000.0, 1000.0 - 2**-13]]).repeat(4000, 1)
    tokens = sample(logits, [SamplingParams(temperature=2**-13)] * 4000).token_ids
    assert abs(np.mean(tokens) - 1 / (1 + np.e)) < 0.03


@st.composite
def any_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 1, 5, 70])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.3])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
        logit_bias=draw(st.sampled_from([None, {1: 3.0}])),
        min_tokens=draw(st.sampled_from([0, 2])),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        logprobs_mode=draw(st.sampled_from(["raw_logprobs", "processed_logprobs"])),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
    )


@settings(max_examples=40)
@given(
    params=st.lists(any_params(), min_size=1, max_size=9),
    vocab_size=st.sampled_from([3, 257, 9001]),
    spread=st.sampled_from([0.3, 3.0]),
    fault=st.sampled_from([None, np.nan, np.inf, -np.inf]),
    data=st.data(),
)
def test_a_row_is_bit_identical_in_any_batch(
    params: list[SamplingParams], vocab_size: int, spread: float, fault: float | None, data: st.DataObject
) -> None:
    """Alone, among others in any order, and next to a row that fails."""
    logits = torch.randn(len(params), vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    states = make_states(params, vocab_size)
    sampler = Sampler(vocab_size, ROOM, cpu)
    alone = [sampler.sample(logits[i : i + 1].clone(), [state]) for i, state in enumerate(states)]
    order = data.draw(st.permutations(range(len(params))))
    faulty = None if fault is None else data.draw(st.sampled_from(order))
    if fault is not None and faulty is not None:
        logits[faulty, 1:] = fault
        logits[faulty, 0] = fault if fault < 0 else 0.0
    together = sampler.sample(logits[order], [states[i] for i in order])
    for place, i in enumerate(order):
        if i == faulty:
            assert together.token_ids[place] == -1
            assert together.errors[place] is not None
            assert together.logprobs[place] is None
        else:
            assert together.token_ids[place] == alone[i].token_ids[0]
            assert together.logprobs[place] == alone[i].logprobs[0]
            assert together.errors[place] is None


@pytest.mark.parametrize("vocab_size", [32_001, 50_257])
def test_threads_do_not_change_a_bit(vocab_size: int) -> None:
    logits = torch.randn(16, vocab_size, generator=torch.Generator().manual_seed(7)) * 3
    params = [p.with_changes(logprobs=3) for p in MIXED] * 2
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sample(logits, params, seed=5))
    finally:
        torch.set_num_threads(num_threads)
    assert results[0] == results[1] == results[2]
    assert sample(logits[3:4], [params[3]], seed=5).logprobs[0] is not None


@pytest.mark.parametrize("params", [SamplingParams(top_p=0.9), SamplingParams(presence_penalty=1.5, min_tokens=4)])
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(params: SamplingParams) -> None:
    vocab_size, steps = 50, 12
    logits = torch.randn(steps, vocab_size, generator=torch.Generator().manual_seed(2))

    def run(state: SamplingState, start: int, end: int) -> list[int]:
        sampler, tokens = Sampler(vocab_size, ROOM, cpu), []
        for step in range(start, end):
            (token_id,) = sampler.sample(logits[step : step + 1].clone(), [state]).token_ids
            state.append(token_id)
            tokens.append(token_id)
        return tokens

    def start(output: list[int], sample_index: int = 0) -> SamplingState:
        return SamplingState(params, [1, 2], output, 99, sample_index, STOP, vocab_size)

    whole = run(start([]), 0, steps)
    for cut in (1, 5, 11):
        assert whole[:cut] + run(start(whole[:cut]), cut, steps) == whole
    assert run(start([], sample_index=1), 0, steps) != whole


def test_states_of_the_same_id_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(2, 10)
    states = make_states([SamplingParams(), SamplingParams(temperature=0)], 10)
    others = make_states([SamplingParams(logprobs=1)], 10)
    sampler = Sampler(10, ROOM, cpu)
    sampler.sample(logits.clone(), states, 7)
    assert sampler.sample(logits[:1].clone(), others).logprobs[0] is not None, "without an id nothing is used again"
    with monkeypatch.context() as patch:
        patch.setattr("quire.sampling.sampler.SamplingBatch", None)
        assert sampler.sample(logits.clone(), states, 7).logprobs == [None, None], "nor anything replaced"
    assert sampler.sample(logits[:1].clone(), others, 8).logprobs[0] is not None


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_batches_are_cut_where_their_logprobs_would_not_fit(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size = 300
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(8))
    modes = ("raw_logprobs", "processed_logprobs")
    params = [
        p.with_changes(logprobs=None if i % 3 == 0 else 4, logprobs_mode=modes[i % 2]) for i, p in enumerate(MIXED * 3)
    ]
    whole = Sampler(vocab_size, ROOM, cpu).sample(logits.clone(), make_states(params, vocab_size))
    taken: list[int] = []

    class Counting(SamplingBatch):
        def __init__(
            self, states: Sequence[SamplingState], size: int, kernels: Kernels, processors: Sequence[Any]
        ) -> None:
            super().__init__(states, size, kernels, processors)
            taken.append(sum(logprob_bytes(size, 4) for state in states if state.params.logprobs is not None))

    monkeypatch.setattr("quire.sampling.sampler.SamplingBatch", Counting)
    room = rows_at_once * logprob_bytes(vocab_size, 4)
    assert Sampler(vocab_size, room, cpu).sample(logits.clone(), make_states(params, vocab_size)) == whole
    assert len(taken) == -(-16 // rows_at_once)
    assert max(taken) <= room


def test_processed_logprobs_are_those_of_what_was_drawn_from() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(4))
    edits = SamplingParams(
        allowed_token_ids=(3, 7, 9, 11), logit_bias={7: 2.0}, temperature=0.5, top_k=3, logprobs=-1, seed=1
    )
    params = [edits.with_changes(logprobs_mode="processed_logprobs"), edits, SamplingParams(temperature=0, logprobs=1)]
    processed, raw, greedy = sample(logits, params).logprobs
    assert processed is not None
    assert raw is not None
    edited = torch.full((30,), -torch.inf)
    edited[[3, 7, 9, 11]] = logits[0, [3, 7, 9, 11]] + torch.tensor([0.0, 2.0, 0.0, 0.0])
    kept = edited.topk(3).indices
    expected = torch.full((30,), -torch.inf)
    expected[kept] = (edited[kept].double() / 0.5).log_softmax(-1).float()
    np.testing.assert_allclose(processed.logprobs, expected[processed.token_ids], atol=1e-6)
    assert processed.token_ids[1:4] == kept.tolist()
    np.testing.assert_allclose(raw.logprobs, logits[1].log_softmax(-1)[raw.token_ids], atol=1e-6)
    assert greedy is not None


def test_logprobs_are_the_models_own_whatever_was_edited() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4))
    params = SamplingParams(allowed_token_ids=(7,), logit_bias={7: -50}, temperature=0.1, logprobs=2)
    (report,) = sample(logits, [params]).logprobs
    assert report is not None
    assert report.token_ids == [7, *logits[0].topk(2).indices.tolist()]
    np.testing.assert_allclose(report.logprobs, logits[0].log_softmax(-1)[report.token_ids], atol=1e-6)
    assert report.ranks[0] == 1 + int((logits[0] > logits[0, 7]).sum())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_errors_say_what_happened(temperature: float) -> None:
    logits = torch.zeros(3, 4)
    logits[0, 2] = torch.nan
    logits[1, 2] = torch.inf
    params = SamplingParams(temperature=temperature, logprobs=1)
    nothing_left = params.with_changes(allowed_token_ids=(2,), min_tokens=1)
    result = sample(logits, [params, params, nothing_left])
    assert result.token_ids == [-1, -1, -1]
    assert result.logprobs == [None, None, None]
    for error, word in zip(result.errors, ("NaN", r"+inf", "allowed_token_ids"), strict=True):
        assert error is not None
        assert word in error


def test_one_token_and_no_rows() -> None:
    assert sample(torch.tensor([[-3.0]]).repeat(8, 1), MIXED).token_ids == [0] * 8
    result = sample(torch.empty(0, 10), [])
    assert (result.token_ids, result.logprobs, result.errors) == ([], [], [])


@pytest.mark.parametrize("vocab_size", [9, 400])
def test_a_beam_gets_its_likeliest_tokens_among_others_who_draw(vocab_size: int) -> None:
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1))
    logits[3] = torch.nan
    beam = SamplingParams(beam_width=4, logit_bias={3: -5.0}, logprobs=2)
    result = sample(logits, [beam, SamplingParams(seed=1), SamplingParams(beam_width=2), beam])
    count = min(vocab_size, 4 + len(STOP))
    expected = logits[0].double().log_softmax(0).numpy()
    reported = expected.copy()
    expected[3] -= 5.0
    order = np.argsort(-expected, kind="stable")[:count].tolist()
    found = result.candidates[0]
    assert found.token_ids == order
    np.testing.assert_allclose(found.logprobs, expected[order], atol=1e-5)
    assert [report.token_ids[0] for report in found.reports] == order
    np.testing.assert_allclose([report.logprobs[0] for report in found.reports], reported[order], atol=1e-5)
    assert len(result.candidates[2].token_ids) == 2 + len(STOP)
    assert result.candidates[2].reports == []
    assert result.token_ids[0] == result.token_ids[2] == -1
    assert 0 <= result.token_ids[1] < vocab_size
    assert [error is None for error in result.errors] == [True, True, True, False]
