"""Batches that follow one another are advanced, and equal what is made anew; whatever else changes is noticed."""

import dataclasses

import numpy as np
import pytest
import torch

from quire.attention import AttentionShape, StepArrays, make_planner
from quire.runner.input_batch import InputBatch, make_input_batch
from quire.runner.request_rows import RequestRows
from quire.step import StepPlan

BLOCK_SIZE = 4


def assert_same(found: InputBatch, expected: InputBatch) -> None:
    for field in dataclasses.fields(InputBatch):
        if field.name not in ("follows", "decoding"):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), field.name)


def test_a_batch_that_follows_equals_one_made_anew() -> None:
    """And a plan of attention that goes on with it sees what it holds."""
    rows = RequestRows(max_num_seqs=8, max_blocks=16, vocab_size=10)
    free = iter(range(100, 200))
    lengths, batch = {5: 3, 2: 9, 7: 4}, None
    plan_attention = make_planner(
        "cpu",
        AttentionShape(
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            block_size=BLOCK_SIZE,
            window=0,
            max_num_seqs=8,
            max_num_tokens=8,
            max_blocks=16,
            num_threads=1,
            kv_element_size=4,
            batch_invariant=False,
            device=torch.device("cpu"),
        ),
    )
    for row, length in lengths.items():
        rows.block_tables[row, : length // BLOCK_SIZE + 1] = [next(free) for _ in range(length // BLOCK_SIZE + 1)]
    for step in range(14):
        plan = StepPlan(rows=list(lengths), num_computed_tokens=list(lengths.values()), num_scheduled_tokens=[1] * 3, token_ids=[step] * 3)
        for row, length in lengths.items():
            if length % BLOCK_SIZE == 0:
                plan.new_blocks.append((row, length // BLOCK_SIZE, [next(free)]))
            lengths[row] += 1
        rows.apply(plan)
        batch = make_input_batch(plan, rows, BLOCK_SIZE, batch)
        assert batch.follows == (step > 0)
        assert_same(batch, make_input_batch(plan, rows, BLOCK_SIZE))
        arrays = StepArrays(batch.query_start_loc, batch.seq_lens, batch.block_tables, batch.slots)
        attention = plan_attention(arrays, repeats=batch.follows)
        for name, array in arrays._asdict().items():
            np.testing.assert_array_equal(getattr(attention, name), array, name)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [1, 0]},
        {"rows": [0], "starts": [8], "counts": [1], "token_ids": [3]},
        {"starts": [8, 7]},
        {"counts": [1, 2], "token_ids": [3, 3, 3]},
        {"block_copies": [(1, 9)]},
        {"new_blocks": [(0, 0, [4, 5, 6])]},
    ],
)
def test_a_batch_that_does_not_follow(change: dict[str, list[object]]) -> None:
    rows = RequestRows(max_num_seqs=2, max_blocks=16, vocab_size=10)
    first = StepPlan(rows=[0, 1], num_computed_tokens=[7, 5], num_scheduled_tokens=[1, 1], token_ids=[3, 3])
    plan = StepPlan(rows=[0, 1], num_computed_tokens=[8, 6], num_scheduled_tokens=[1, 1], token_ids=[3, 3])
    assert make_input_batch(plan, rows, BLOCK_SIZE, make_input_batch(first, rows, BLOCK_SIZE)).follows
    changed = dataclasses.replace(plan, **change)
    assert not make_input_batch(changed, rows, BLOCK_SIZE, make_input_batch(first, rows, BLOCK_SIZE)).follows
