"""InputBatch: a plan and the rows' block tables as flat arrays, the form in which a model reads them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.runner.request_rows import RequestRows
from quire.step import StepPlan

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class InputBatch:
    """T tokens of B sequences. All arrays are int32."""

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


def make_input_batch(plan: StepPlan, rows: RequestRows, block_size: int) -> InputBatch:
    """Vectorised over sequences and tokens; no Python per either."""
    row_index = np.array(plan.rows, dtype=np.int32)
    counts = np.array(plan.counts, dtype=np.int32)
    starts = np.array(plan.starts, dtype=np.int32)
    query_start_loc = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    seq_lens = starts + counts
    positions = np.arange(query_start_loc[-1], dtype=np.int32) - np.repeat(query_start_loc[:-1] - starts, counts)
    max_blocks = -(-int(seq_lens.max(initial=0)) // block_size)
    blocks = rows.block_tables[np.repeat(row_index, counts), positions // block_size]
    return InputBatch(
        input_ids=np.array(plan.token_ids, dtype=np.int32),
        positions=positions,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=np.ascontiguousarray(rows.block_tables[row_index, :max_blocks]),
        slots=blocks * np.int32(block_size) + positions % block_size,
    )
