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
    """T tokens of B sequences. All arrays are int32."""

    input_ids: Int32Array
    """[T]; `~row` stands for the token last sampled on the device for that row."""
    positions: Int32Array
    """[T]"""
    query_start_loc: Int32Array
    """[B + 1]: sequence s owns tokens query_start_loc[s] up to query_start_loc[s + 1]."""
    seq_lens: Int32Array
    """[B]: tokens whose KV is stored once this step has written its own."""
    block_tables: list[Int32Array]
    """[B, most blocks of any sequence] for each KV group"""
    slots: list[Int32Array]
    """[T] for each KV group: where each token's KV goes, block * block_size + offset."""
    token_types: Int32Array | None = None
    """[T]: 1 for the tokens of a pair's second text; None where there is none."""
    repeatable: "_Repeatable | None" = None
    """What `advance` needs; None if the plan has no `batch_id`."""

    def advance(self, plan: StepPlan, rows: RequestRows, block_size: int) -> None:
        """Update all arrays in place for `plan`, which repeats this batch with one more token per sequence (see
        `StepPlan.batch_id`). Only `block_tables` become new arrays, when a sequence needs one more column."""
        repeatable = self.repeatable
        assert repeatable is not None, "a plan without batch_id cannot be repeated"
        positions = plan.num_computed_tokens
        repeatable.slots = slots = [slot + 1 for slot in repeatable.slots]
        for sequence in [index for index, position in enumerate(positions) if not position % block_size]:
            index = positions[sequence] // block_size  # a new block
            for group, table in enumerate(self.block_tables):
                block = int(rows.block_tables[group, plan.rows[sequence], index])
                slots[group * len(positions) + sequence] = block * block_size
                if index == table.shape[1]:
                    table = self.block_tables[group] = rows.tables_of(group, plan.rows, index + 1)
                table[sequence, index] = block
        repeatable.write(*plan.token_ids, *positions, *[position + 1 for position in positions], *slots)


@dataclass(slots=True)
class _Repeatable:
    """How the arrays of a steadily decoding batch are overwritten.

    Right after the weights have passed through the caches, one call of NumPy takes some 20 µs whatever the size of its
    arrays. So numbers are kept as lists and written to all arrays at once.
    """

    write: Callable[..., None]
    """Overwrites input_ids, positions, seq_lens and slots, which lie one after the other."""
    slots: list[int]
    """The slots of the first KV group, then of the next."""


def make_input_batch(plan: StepPlan, rows: RequestRows, block_size: int) -> InputBatch:
    """Lay out a plan, vectorised over sequences and tokens."""
    row_index = np.array(plan.rows, dtype=np.int32)
    counts = np.array(plan.num_scheduled_tokens, dtype=np.int32)
    starts = np.array(plan.num_computed_tokens, dtype=np.int32)
    query_start_loc = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    seq_lens = starts + counts
    positions = np.arange(query_start_loc[-1], dtype=np.int32) - np.repeat(query_start_loc[:-1] - starts, counts)
    max_blocks = -(-int(seq_lens.max(initial=0)) // block_size)
    token_rows, index_of_block, offsets = np.repeat(row_index, counts), positions // block_size, positions % block_size
    slots = [table[token_rows, index_of_block] * np.int32(block_size) + offsets for table in rows.block_tables]
    input_ids, repeatable = np.array(plan.token_ids, dtype=np.int32), None
    second = np.repeat(rows.second_texts[row_index], counts)
    token_types = ((second > 0) & (positions >= second)).astype(np.int32) if second.any() else None
    if plan.batch_id:
        memory = np.stack((input_ids, positions, seq_lens, *slots))
        input_ids, positions, seq_lens, *slots = memory
        write = partial(Struct(f"{memory.size}i").pack_into, memory.data, 0)
        repeatable = _Repeatable(write, memory[3:].ravel().tolist())
    return InputBatch(
        input_ids=input_ids,
        positions=positions,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=[rows.tables_of(group, row_index, max_blocks) for group in range(rows.num_groups)],
        slots=slots,
        token_types=token_types,
        repeatable=repeatable,
    )
