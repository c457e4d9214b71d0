"""The selected tokens of a step, against the plain definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire.runner.input_batch import InputBatch
from quire.runner.output_selection import _MIN_UNUSED, select_outputs
from quire.runner.sampling_metadata import SamplingMetadata
from quire.step import StepPlan


@given(st.data())
def test_all_that_is_asked_for_and_each_sequences_last(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=6))
    end = np.cumsum(counts)
    sample_indices, sampled = [], []
    for sequence in data.draw(st.sets(st.integers(0, len(counts) - 1))):
        # The last known token, and draft tokens after it; a grammar may have cut some.
        last_known = data.draw(st.integers(0, min(4, counts[sequence] - 1)))
        points = data.draw(st.integers(1, last_known + 1))
        repeats = data.draw(st.integers(1, 3)) if last_known == 0 else 1  # samples part where the prompt ends
        sample_indices += [sequence] * repeats
        sampled += [end[sequence] - 1 - last_known + point for point in range(points)] * repeats
    plan = StepPlan(num_scheduled_tokens=counts, sample_indices=sample_indices, token_ids=[0] * int(end[-1]))
    for sequence in data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=2)):
        plan.prompt_logprobs[sequence] = (0, [0] * counts[sequence])
    others = sorted({*range(len(counts))} - {*sample_indices})
    plan.pool_rows = sorted(data.draw(st.sets(st.sampled_from(others)))) if others else []

    asked = set(map(int, sampled)) | {int(end[sequence]) - 1 for sequence in plan.pool_rows}
    for sequence in plan.prompt_logprobs:
        asked |= set(range(int(end[sequence]) - counts[sequence], int(end[sequence])))
    selection = select_outputs(plan, _sampling(sampled), _batch(counts))

    if selection is None:
        first = [min((t for t in asked if e - c <= t < e), default=e) for e, c in zip(end, counts, strict=True)]
        assert sum(counts) - max(1, sum(end - first)) < _MIN_UNUSED  # at least one is selected
        return
    assert asked <= set(selection.tokens.tolist())
    np.testing.assert_array_equal(selection.tokens[selection.indices_of(np.array(sampled, dtype=np.int32))], sampled)
    assert len(selection.tokens) > 0
    assert sum(counts) - len(selection.tokens) >= _MIN_UNUSED
    for sequence, (begin, stop) in enumerate(zip(end - counts, end, strict=True)):
        tokens = [token for token in selection.tokens.tolist() if begin <= token < stop]
        assert tokens == list(range(stop - len(tokens), stop))
        assert (sequence in selection.sequences.tolist()) == bool(tokens)
        if tokens and asked:
            assert tokens[0] in asked
        if tokens:
            place = selection.sequences.tolist().index(sequence)
            assert selection.query_start_loc[place + 1] - selection.query_start_loc[place] == len(tokens)


def test_one_token_is_selected_without_samples() -> None:
    plan = StepPlan(num_scheduled_tokens=[64, 64], token_ids=[0] * 128)
    selection = select_outputs(plan, _sampling([]), _batch([64, 64]))
    assert selection is not None
    assert selection.tokens.tolist() == [127]


def _sampling(tokens: list[int]) -> SamplingMetadata:
    empty = np.empty(0, dtype=np.int32)
    return SamplingMetadata(
        states=[],
        states_id=0,
        tokens=np.array(tokens, dtype=np.int32),
        rows=empty,
        offsets=[],
        after_every_token=False,
        grammars=[],
        outputs=None,
    )


def _batch(counts: list[int]) -> InputBatch:
    empty = np.empty(0, dtype=np.int32)
    query_start_loc = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    tokens = np.zeros(sum(counts), dtype=np.int32)
    return InputBatch(tokens, tokens, query_start_loc, empty, empty, empty)
