"""SamplingState: resuming equals having run through; what is not asked for is not kept."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire.sampling.state import SamplingMode, SamplingState
from quire.sampling_params import SamplingParams

VOCAB_SIZE = 12
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)


def make(params: SamplingParams, prompt: list[int], output: list[int]) -> SamplingState:
    return SamplingState(params, prompt, output, 0, 0, (2, VOCAB_SIZE + 1), VOCAB_SIZE)


@given(prompt=tokens, output=tokens, cut=st.integers(0, 12), repetition=st.sampled_from([1.0, 1.3]))
def test_a_resumed_state_equals_one_that_ran_through(
    prompt: list[int], output: list[int], cut: int, repetition: float
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        frequency_penalty=0.5,
        min_tokens=5,
        bad_words_token_ids=((1, 2), (3,), (4, 5, 6)),
    )
    resumed, ran = make(params, prompt, output[:cut]), make(params, prompt, [])
    for token_id in output[:cut]:
        ran.append(token_id)
    for token_id in output[cut:]:
        resumed.append(token_id)
        ran.append(token_id)
    assert resumed.position == ran.position == len(output)
    assert resumed.banned_ids() == ran.banned_ids()
    assert resumed.token_counts is not None
    assert ran.token_counts is not None
    assert resumed.token_counts.ids == ran.token_counts.ids
    assert resumed.token_counts.num_generated == ran.token_counts.num_generated


def test_ending_tokens_are_banned_until_min_tokens() -> None:
    state = make(SamplingParams(min_tokens=2), [], [])
    bans = []
    for _ in range(3):
        bans.append(state.banned_ids())
        state.append(0)
    assert bans == [[2], [2], []]


def test_nothing_is_kept_that_is_not_needed() -> None:
    state = make(SamplingParams(), [1] * 1000, [2] * 10)
    assert state.position == 10
    assert state.token_counts is None
    assert state.bad_words is None
    assert not state.ending_ids


def test_only_the_repetition_penalty_looks_at_the_prompt() -> None:
    counted = make(SamplingParams(presence_penalty=1.0), [1, 2, 3], [4]).token_counts
    assert counted is not None
    assert list(counted.ids) == [4]


def test_filters_that_keep_everything_are_no_filters() -> None:
    ways: dict[SamplingMode, list[dict[str, Any]]] = {
        SamplingMode.GREEDY: [{"temperature": 0.0, "top_k": 5}, {"temperature": 1e-6}],
        SamplingMode.UNFILTERED: [{}, {"top_k": -1}, {"top_k": VOCAB_SIZE}, {"min_p": 0.1}],
        SamplingMode.TOP_K: [{"top_k": 1}, {"top_k": 5, "top_p": 0.5}],
        SamplingMode.TOP_P: [{"top_p": 0.5}, {"top_p": 0.5, "top_k": VOCAB_SIZE}],
    }
    for mode, fields in ways.items():
        for values in fields:
            assert make(SamplingParams(**values), [], []).mode is mode


@given(prompt=tokens, output=tokens, mine=tokens, theirs=tokens)
def test_a_fork_is_independent(prompt: list[int], output: list[int], mine: list[int], theirs: list[int]) -> None:
    params = SamplingParams(repetition_penalty=1.3, bad_words_token_ids=((1, 2), (4, 5, 6)), beam_width=3)
    parent = make(params, prompt, output)
    child = parent.fork()
    for token_id in theirs:
        child.append(token_id)
    for token_id in mine:
        parent.append(token_id)
    for state, tail in ((parent, mine), (child, theirs)):
        expected = make(params, prompt, output + tail)
        assert state.position == expected.position
        assert state.banned_ids() == expected.banned_ids()
        assert state.token_counts is not None
        assert expected.token_counts is not None
        assert state.token_counts.ids == expected.token_counts.ids
        assert state.token_counts.num_generated == expected.token_counts.num_generated
