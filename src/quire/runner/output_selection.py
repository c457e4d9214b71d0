"""OutputSelection: of which of a step's tokens anybody asks the hidden state, so that the last layer computes no others.

Of a prompt that is the last token alone, and none while it is computed in chunks. Keys and values are needed of all
tokens, in all layers; whatever else the last layer has is not.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.runner.input_batch import InputBatch, Int32Array
from quire.runner.sampling_metadata import SamplingMetadata
from quire.step import StepPlan

# Tokens whose last layer takes as long as planning attention a second time, on a small model.
_MIN_UNREAD = 32


@dataclass(frozen=True, slots=True)
class OutputSelection:
    """R tokens, those of one sequence side by side, always the last of those it computes."""

    tokens: Int32Array
    """[R], ascending; one even where nobody asks, since kernels take no empty batch."""
    sequences: NDArray[np.int64]
    """Those that any of the tokens belong to."""
    query_start_loc: Int32Array
    """[len(sequences) + 1]: sequences[s] owns tokens query_start_loc[s] up to query_start_loc[s + 1]."""

    def places(self, tokens: Int32Array) -> Int32Array:
        """Tokens of the step, all of them read -> where each stands in `tokens`."""
        return np.searchsorted(self.tokens, tokens).astype(np.int32)


def select_outputs(plan: StepPlan, points: SamplingMetadata, batch: InputBatch) -> OutputSelection | None:
    """None where too few tokens are left out to be worth it."""
    begin, end = batch.query_start_loc[:-1], batch.query_start_loc[1:]
    if len(batch.input_ids) - len(plan.sample_indices) < _MIN_UNREAD:
        return None
    first = end.copy()
    np.minimum.at(first, np.searchsorted(end, points.tokens, side="right"), points.tokens)
    for sequence in plan.prompt_logprobs:
        first[sequence] = begin[sequence]
    if (first == end).all():
        first[-1] -= 1
    counts = end - first
    if len(batch.input_ids) - counts.sum() < _MIN_UNREAD:
        return None
    sequences = np.flatnonzero(counts)
    query_start_loc = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts[sequences], out=query_start_loc[1:])
    shift = np.repeat(first[sequences] - query_start_loc[:-1], counts[sequences])
    tokens = np.arange(query_start_loc[-1], dtype=np.int32) + shift
    return OutputSelection(tokens, sequences, query_start_loc)
