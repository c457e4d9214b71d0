"""InputBatch: a plan and the rows' block tables as flat arrays, the form in which a model reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from quire.runner.request_rows import RequestRows
from quire.step import StepPlan

Int32Array = NDArray[np.int32]


@dataclass(slots=True)
class InputBatch:
    """T tokens of B sequences. All arrays are int32, and those of the batch before where this one follows it."""

    rows: list[int]
    """[B]: the row of each sequence."""
    input_ids: Int32Array
    """[T]"""
    positions: Int32Array
    """[T]"""
    query_start_loc: Int32Array
    """[B + 1]: sequence s owns tokens query_start_loc[s] up to query_start_loc[s + 1]."""
    seq_lens: Int32Array
    """[B]: tokens whose KV is stored once this step has written its own."""
    block_tables: Int32Array
    """[B, most blocks of any]"""
    slots: Int32Array
    """[T]: where each token's KV goes, block * block_size + offset."""
    follows: bool
    """Whether it is the batch before with one more token of each sequence, and nothing else of them has changed: then
    what was made of that batch is advanced instead of made anew."""
    decoding: "_Decoding | None" = None
    """Where every sequence computes one token: what it is advanced by."""


@dataclass(slots=True)
class _Decoding:
    """Numbers of a batch as lists: where the weights have just passed through the caches, a call of NumPy takes some
    20 µs, whatever the size of its arrays."""

    write: Callable[..., None]
    """Overwrites input_ids, positions, seq_lens and slots, which lie one behind the other."""
    seq_lens: list[int]
    slots: list[int]


def make_input_batch(
    plan: StepPlan, rows: RequestRows, block_size: int, before: InputBatch | None = None
) -> InputBatch:
    """Vectorised over sequences and tokens, but where this one follows `before`, the batch of the step before, which is
    overwritten then."""
    if before is not None and _follows(plan, before):
        return _advance(plan, rows, block_size, before)
    row_index = np.array(plan.rows, dtype=np.int32)
    counts = np.array(plan.num_scheduled_tokens, dtype=np.int32)
    starts = np.array(plan.num_computed_tokens, dtype=np.int32)
    query_start_loc = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    seq_lens = starts + counts
    positions = np.arange(query_start_loc[-1], dtype=np.int32) - np.repeat(query_start_loc[:-1] - starts, counts)
    max_blocks = -(-int(seq_lens.max(initial=0)) // block_size)
    blocks = rows.block_tables[np.repeat(row_index, counts), positions // block_size]
    slots = blocks * np.int32(block_size) + positions % block_size
    input_ids, decoding = np.array(plan.token_ids, dtype=np.int32), None
    if len(positions) == len(seq_lens):
        memory = np.stack((input_ids, positions, seq_lens, slots))
        input_ids, positions, seq_lens, slots = memory
        write = partial(Struct(f"{memory.size}i").pack_into, memory.data, 0)
        decoding = _Decoding(write, seq_lens.tolist(), slots.tolist())
    return InputBatch(
        rows=plan.rows,
        input_ids=input_ids,
        positions=positions,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=np.ascontiguousarray(rows.block_tables[row_index, :max_blocks]),
        slots=slots,
        follows=False,
        decoding=decoding,
    )


def _follows(plan: StepPlan, before: InputBatch) -> bool:
    return (
        before.decoding is not None
        and plan.rows == before.rows
        and plan.num_tokens == len(plan.rows)
        and plan.num_computed_tokens == before.decoding.seq_lens
        # Rows that begin, fork or lose a block to a copy are told by these; else tables only grow.
        and not (plan.new_rows or plan.row_forks or plan.block_copies)
        and all(first > 0 for _, first, _ in plan.new_blocks)
    )


def _advance(plan: StepPlan, rows: RequestRows, block_size: int, batch: InputBatch) -> InputBatch:
    """In place; only tables that become wider are made anew."""
    decoding = batch.decoding
    assert decoding is not None, "all sequences compute one token"
    positions = plan.num_computed_tokens
    decoding.seq_lens = [position + 1 for position in positions]
    decoding.slots = slots = [slot + 1 for slot in decoding.slots]
    for sequence, position in enumerate(positions):
        if position % block_size == 0:  # a block begins
            index = position // block_size
            block = rows.block_tables[plan.rows[sequence], index]
            slots[sequence] = int(block) * block_size
            if index == batch.block_tables.shape[1]:
                batch.block_tables = np.ascontiguousarray(rows.block_tables[np.array(plan.rows), : index + 1])
            batch.block_tables[sequence, index] = block
    decoding.write(*plan.token_ids, *positions, *decoding.seq_lens, *slots)
    batch.follows = True
    return batch
