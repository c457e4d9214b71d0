"""A batch that is advanced equals one laid out anew, whatever a repeated step may change."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire.attention import AttentionShape, GroupPlanner, StepArrays
from quire.runner.input_batch import InputBatch, make_input_batch
from quire.runner.request_rows import RequestRows
from quire.step import StepPlan

BLOCK_SIZE = 4


def assert_same(found: InputBatch, expected: InputBatch) -> None:
    num_blocks = -(-expected.seq_lens[:, None] // BLOCK_SIZE)
    past_the_end = np.arange(expected.block_tables[0].shape[1]) >= num_blocks
    for batch in (found, expected):
        for table in batch.block_tables:
            table[past_the_end] = 0  # never read
    for field in dataclasses.fields(InputBatch):
        if field.name != "repeatable":
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), field.name)


@given(lengths=st.dictionaries(st.integers(0, 7), st.integers(1, 13), min_size=1, max_size=4), data=st.data())
def test_an_advanced_batch_equals_one_laid_out_anew(lengths: dict[int, int], data: st.DataObject) -> None:
    """And a plan of attention that goes on with it reads what it holds. Blocks come when they are needed, sometimes a
    step early."""
    rows = RequestRows(max_num_seqs=8, max_blocks=16, vocab_size=10, num_groups=2)
    free, early, batch = iter(range(100, 300)), set[tuple[int, int]](), None
    shape = AttentionShape(num_heads=2, num_kv_heads=1, head_dim=32, block_size=BLOCK_SIZE)
    plan_attention = GroupPlanner("cpu", [shape, shape])
    for row, length in lengths.items():
        for table in rows.block_tables:
            table[row, : -(-length // BLOCK_SIZE)] = [next(free) for _ in range(-(-length // BLOCK_SIZE))]
    for step in range(14):
        plan = StepPlan(
            batch_id=1,
            rows=list(lengths),
            num_computed_tokens=list(lengths.values()),
            num_scheduled_tokens=[1] * len(lengths),
            token_ids=[step] * len(lengths),
        )
        for row, length in lengths.items():
            index = length // BLOCK_SIZE
            if length % BLOCK_SIZE == 0 and (row, index) not in early:
                plan.new_blocks += [(row, group, index, [next(free)]) for group in range(2)]
            elif length % BLOCK_SIZE == BLOCK_SIZE - 1 and data.draw(st.booleans()):
                rows.block_tables[:, row, index + 1] = next(free), next(free)
                early.add((row, index + 1))
            lengths[row] += 1
        rows.apply(plan)
        if batch is None:
            batch = make_input_batch(plan, rows, BLOCK_SIZE)
        else:
            batch.advance(plan, rows, BLOCK_SIZE)
        assert_same(batch, make_input_batch(plan, rows, BLOCK_SIZE))
        arrays = [
            StepArrays(batch.query_start_loc, batch.seq_lens, *each)
            for each in zip(batch.block_tables, batch.slots, strict=True)
        ]
        for group, plan_of_group in zip(arrays, plan_attention(arrays, repeats=step > 0), strict=True):
            assert group.lookaheads is None
            for name in ("query_start_loc", "seq_lens", "block_tables", "slots"):
                np.testing.assert_array_equal(getattr(plan_of_group, name), getattr(group, name), name)
