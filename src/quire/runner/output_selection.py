"""OutputSelection: the tokens of a step whose hidden states are needed, so that the last layer computes no others.

Of a prompt only the last token is needed, and none while the prompt is computed in chunks. Every layer needs the keys
and values of all tokens; the rest of the last layer is needed for the selected tokens alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.runner.input_batch import InputBatch, Int32Array
from quire.runner.sampling_metadata import SamplingMetadata
from quire.step import StepPlan

# In a small model, computing this many tokens in the last layer takes as long as planning attention a second time.
_MIN_UNUSED = 32


@dataclass(frozen=True, slots=True)
class OutputSelection:
    """R tokens; those of one sequence stand side by side and are its last in this step."""

    tokens: Int32Array
    """[R], ascending; at least one, since kernels take no empty batch."""
    sequences: NDArray[np.int64]
    """The sequences with at least one selected token."""
    query_start_loc: Int32Array
    """[len(sequences) + 1]: sequences[s] owns tokens query_start_loc[s] up to query_start_loc[s + 1]."""

    def indices_of(self, tokens: Int32Array) -> Int32Array:
        """The index in `self.tokens` of each of these tokens of the step. All of them must be selected."""
        return np.searchsorted(self.tokens, tokens).astype(np.int32)


def select_outputs(
    plan: StepPlan, sampling: SamplingMetadata, batch: InputBatch, *, pools_all_tokens: bool = False
) -> OutputSelection | None:
    """None if too few tokens could be left out to be worth it, or tokens of images may be among those that are read: a
    plan of their own would not know which keys these see."""
    if plan.prompt_logprobs and plan.images is not None:
        return None
    begin, end = batch.query_start_loc[:-1], batch.query_start_loc[1:]
    if len(batch.input_ids) - len(plan.sample_indices) < _MIN_UNUSED:
        return None
    first = end.copy()
    np.minimum.at(first, np.searchsorted(end, sampling.tokens, side="right"), sampling.tokens)
    if plan.pool_rows:
        first[plan.pool_rows] = begin[plan.pool_rows] if pools_all_tokens else first[plan.pool_rows] - 1
    for sequence in plan.prompt_logprobs:
        first[sequence] = begin[sequence]
    if (first == end).all():
        first[-1] -= 1
    counts = end - first
    if len(batch.input_ids) - counts.sum() < _MIN_UNUSED:
        return None
    sequences = np.flatnonzero(counts)
    query_start_loc = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts[sequences], out=query_start_loc[1:])
    shift = np.repeat(first[sequences] - query_start_loc[:-1], counts[sequences])
    tokens = np.arange(query_start_loc[-1], dtype=np.int32) + shift
    return OutputSelection(tokens, sequences, query_start_loc)
