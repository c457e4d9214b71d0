"""Which steps repeat the one before: one integer decides, and whatever else happens in between makes a step new."""

import numpy as np
import torch

from quire.runner.request_rows import RequestRows
from quire.runner.step_inputs import StepInputBuilder
from quire.sampling_params import SamplingParams
from quire.step import NewRow, StepPlan

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def new_row(row: int, params: SamplingParams | None = None) -> NewRow:
    return NewRow(row, params or SamplingParams(), [1], [], seed=row, sample_index=0, stop_token_ids=())


def make_builder(num_rows: int = 3) -> tuple[StepInputBuilder, RequestRows]:
    rows = RequestRows(max_num_seqs=num_rows, max_blocks=16, vocab_size=10)
    rows.apply(StepPlan(new_rows=[new_row(row) for row in range(num_rows)]))
    rows.block_tables[0] = np.arange(16 * num_rows).reshape(num_rows, 16)
    return StepInputBuilder(rows, BLOCK_SIZE, CPU), rows


def decode(batch_id: int, rows: list[int], position: int) -> StepPlan:
    return StepPlan(
        batch_id=batch_id,
        rows=rows,
        num_computed_tokens=[position] * len(rows),
        num_scheduled_tokens=[1] * len(rows),
        token_ids=[position % 10] * len(rows),
        sample_rows=rows,
        sample_indices=list(range(len(rows))),
    )


def prefill(row: int, count: int) -> StepPlan:
    return StepPlan(
        rows=[row],
        num_computed_tokens=[0],
        num_scheduled_tokens=[count],
        token_ids=[1] * count,
        sample_rows=[row],
        sample_indices=[0],
    )


def test_a_step_repeats_the_last_one_of_its_id() -> None:
    builder, _ = make_builder()
    steps = [builder.lay_out(decode(5, [0, 2], position)) for position in range(2, 12)]
    assert [step.repeats for step in steps] == [False] + [True] * 9
    assert all(step.sampling is steps[0].sampling for step in steps)
    assert all(step.batch is steps[0].batch for step in steps)
    assert steps[-1].batch.positions.tolist() == [11, 11]
    assert steps[-1].batch.seq_lens.tolist() == [12, 12]
    assert steps[-1].batch.slots[0].tolist() == [4 * 2 + 3, 4 * 34 + 3]


def test_what_makes_a_step_new() -> None:
    builder, _ = make_builder()
    plans = [
        (decode(0, [0, 2], 2), False),
        (decode(0, [0, 2], 3), False),  # without an id nothing repeats
        (decode(1, [0, 2], 4), False),
        (decode(1, [0, 2], 5), True),
        (decode(2, [0, 1, 2], 6), False),
        (prefill(1, 40), False),
        (decode(2, [0, 1, 2], 7), False),  # another step lies between
        (decode(2, [0, 1, 2], 8), True),
    ]
    for plan, repeats in plans:
        step = builder.lay_out(plan)
        assert step.repeats == repeats
        assert step.batch.positions[-1] == plan.num_computed_tokens[-1] + plan.num_scheduled_tokens[-1] - 1
        assert step.batch.input_ids.tolist() == plan.token_ids
    builder.clear()  # a step has failed: it is run again, at the same positions
    assert not builder.lay_out(decode(2, [0, 1, 2], 8)).repeats


def test_states_keep_their_id_while_they_are_the_same() -> None:
    builder, rows = make_builder()

    def states_id(plan: StepPlan) -> int:
        return builder.lay_out(plan).sampling.states_id

    first = states_id(decode(0, [0, 2], 2))
    assert first != 0
    assert states_id(decode(0, [0, 2], 3)) == first
    assert states_id(decode(4, [0, 2], 4)) == first
    assert states_id(decode(4, [0, 2], 5)) == first
    drafted = decode(0, [0, 2], 6)
    drafted.drafts, drafted.num_scheduled_tokens, drafted.token_ids = {1: [7]}, [1, 2], [6, 6, 7]
    assert states_id(drafted) == 0
    assert states_id(decode(0, [0, 2], 8)) == first, "forks for drafts do not come again"
    assert states_id(decode(0, [2, 0], 9)) not in (0, first)
    again = states_id(decode(0, [0, 2], 10))
    rows.apply(StepPlan(new_rows=[new_row(2)]))  # another sequence takes the row
    assert states_id(decode(0, [0, 2], 11)) not in (0, again)


def test_a_repeated_step_is_sent_without_new_tensors() -> None:
    """On a CPU they share the memory of the arrays; but not with columns, which are new in every step."""
    builder, _ = make_builder()
    sent = builder.send(builder.lay_out(decode(1, [0, 1], 7)), {})
    step = builder.lay_out(decode(1, [0, 1], 8))
    again = builder.send(step, {})
    assert again is sent
    assert again.tensors["token_positions"].tolist() == [8, 8]
    assert again.tensors["input_ids"].tolist() == [8, 8]
    with_columns = builder.send(builder.lay_out(decode(1, [0, 1], 9)), {"top_k": np.array([3, 4], dtype=np.int32)})
    assert with_columns.tensors["top_k"].tolist() == [3, 4]
    assert with_columns.tensors["token_positions"].tolist() == [9, 9]
    without = builder.send(builder.lay_out(decode(1, [0, 1], 10)), {})
    assert "top_k" not in without.tensors


def test_hidden_states_of_selected_tokens() -> None:
    builder, _ = make_builder()
    sent = builder.send(builder.lay_out(prefill(1, 50)), {})
    assert sent.selection is not None
    assert sent.tensors["output_tokens"].tolist() == [49]
    assert sent.sampled.tolist() == [0]
    assert sent.hidden_indices(np.array([49], dtype=np.int32)).tolist() == [0]
    short = builder.send(builder.lay_out(prefill(1, 5)), {})
    assert short.selection is None
    assert short.hidden_indices(np.array([3], dtype=np.int32)).tolist() == [3]
