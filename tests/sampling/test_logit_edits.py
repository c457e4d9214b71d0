"""Edits of logits against plain loops over tokens, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.sampling.logit_edits import LogitEdits
from quire.sampling.state import SamplingState
from quire.sampling_params import SamplingParams

VOCAB_SIZE = 24
STOP = (2, 3)
token_ids = st.integers(0, VOCAB_SIZE - 1)
tokens = st.lists(token_ids, max_size=10)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        repetition_penalty=draw(st.sampled_from([1.0, 1.1, 0.7, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3, -1.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.9, -2.0])),
        min_tokens=draw(st.sampled_from([0, 3, 12])),
        logit_bias=draw(st.none() | st.dictionaries(token_ids, st.floats(-100, 100, width=32), max_size=4)),
        allowed_token_ids=draw(st.none() | st.lists(token_ids, min_size=1, max_size=8).map(tuple)),
        bad_words_token_ids=draw(
            st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)
        ),
    )


def edit_plainly(row: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> None:
    """The definition, one token after the other, in float32."""
    f = np.float32
    for id in range(VOCAB_SIZE):
        if params.allowed_token_ids is not None and id not in params.allowed_token_ids:
            row[id] = -np.inf
        for *prefix, last in params.bad_words_token_ids:
            if last == id and output[max(0, len(output) - len(prefix)) :] == prefix:
                row[id] = -np.inf
        if len(output) < params.min_tokens and id in STOP:
            row[id] = -np.inf
        if params.logit_bias and id in params.logit_bias:
            row[id] += f(params.logit_bias[id])
        if id in prompt or id in output:
            factor = f(params.repetition_penalty)
            row[id] = row[id] / factor if row[id] > 0 else row[id] * factor
        row[id] -= f(params.frequency_penalty) * f(output.count(id))
        if id in output:
            row[id] -= f(params.presence_penalty)


@given(st.lists(st.tuples(params(), tokens, tokens), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_equals_plain_loops(requests: list[tuple[SamplingParams, list[int], list[int]]], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=(len(requests), VOCAB_SIZE)).astype(np.float32)
    states, expected = [], logits.copy()
    for row, (param, prompt, output) in zip(expected, requests, strict=True):
        states.append(SamplingState(param, prompt, output, 0, 0, STOP, VOCAB_SIZE))
        edit_plainly(row, param, prompt, output)
    edits = LogitEdits(states, VOCAB_SIZE)
    edits.apply(logits, edits.read())
    np.testing.assert_array_equal(logits, expected)


def test_edits_follow_the_states_as_they_grow() -> None:
    params = SamplingParams(frequency_penalty=1.0, min_tokens=2, bad_words_token_ids=((5, 6),))
    state = SamplingState(params, [], [], 0, 0, STOP, VOCAB_SIZE)
    edits = LogitEdits([state], VOCAB_SIZE)
    output: list[int] = []
    for token_id in (5, 6, 5, 5):
        logits, expected = np.ones((1, VOCAB_SIZE), np.float32), np.ones(VOCAB_SIZE, np.float32)
        edit_plainly(expected, params, [], output)
        edits.apply(logits, edits.read())
        np.testing.assert_array_equal(logits[0], expected)
        state.append(token_id)
        output.append(token_id)


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_fault_does_not_hide_behind_a_mask(fault: float) -> None:
    states = [
        SamplingState(params, [], [], 0, 0, STOP, VOCAB_SIZE)
        for params in (SamplingParams(allowed_token_ids=(1,)), SamplingParams(min_tokens=1), SamplingParams())
    ]
    logits = np.zeros((3, VOCAB_SIZE), np.float32)
    logits[:2, STOP[0]] = fault
    edits = LogitEdits(states, VOCAB_SIZE)
    edits.apply(logits, edits.read())
    assert np.isnan(logits[:2]).all()
    assert (logits[2] == 0).all()
