"""SamplingBatch: what a list of sequences asks of sampling, gathered into arrays and grouped by need.

In decode the same sequences come again step after step, so the gathering is done once and only positions are read anew.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.cpu import row_peaks
from quire.sampling.draws import FloatArray, IntArray
from quire.sampling.logit_edits import LogitEdits
from quire.sampling.logits_processors import BatchLogitsProcessor, LogitsProcessing
from quire.sampling.row_places import place_of, split_rows
from quire.sampling.state import Draw, SamplingState
from quire.sampling.uniforms import stream_keys, uniforms
from quire.step import logprob_bytes


class RowPeaks:
    """Where the highest logits of some rows go, step after step: tensors, and the same memory as arrays."""

    def __init__(self, num_rows: int) -> None:
        self._logits, self._ids = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int32)
        self._arrays = self._ids.numpy(), self._logits.numpy()

    def find(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """Of each row of `logits` the most likely token, of equals the lowest id, and its logit."""
        row_peaks(logits, self._logits, self._ids)
        ids, peaks = self._arrays
        return ids.tolist(), peaks.tolist()


class RowGroup:
    """Rows that are drawn from in the same way, few enough for their temporaries."""

    def __init__(self, draw: Draw, rows: Sequence[int], states: Sequence[SamplingState]) -> None:
        params = [states[row].params for row in rows]
        self.draw = draw
        self.rows = list(rows)
        self.place = place_of(rows)
        self.peaks = RowPeaks(len(rows)) if draw is Draw.GREEDY else None
        self.top_k: IntArray = np.array([p.top_k for p in params], dtype=np.int64)
        self.top_p: FloatArray = np.array([p.top_p for p in params])
        # None where every row would be left as it is; a temperature of 1 and a min_p of 0 change no bit either.
        temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32).unsqueeze(1)
        self.temperatures = None if bool((temperatures == 1.0).all()) else temperatures
        min_p = np.array([p.min_p for p in params], dtype=np.float32)
        self.min_p = min_p if min_p.any() else None


class SamplingBatch:
    """The groups, edits, logprob requests and random streams of one list of sequences."""

    def __init__(
        self,
        states: Sequence[SamplingState],
        vocab_size: int,
        logits_processors: Sequence[BatchLogitsProcessor] = (),
    ) -> None:
        self.states = list(states)
        self.processors = LogitsProcessing(self.states, logits_processors)
        self.edits = LogitEdits(states, vocab_size)
        self.groups = _group_rows(self.states, vocab_size)
        draws = {group.draw for group in self.groups}
        self._output_token_ids = None if draws <= {Draw.GREEDY, Draw.BEAM} else [s.output_token_ids for s in states]
        """Whose length is each sequence's position, where any token is left to chance."""
        self._zeros: FloatArray = np.zeros(len(states))
        self.logprob_rows: defaultdict[int, list[int]] = defaultdict(list)
        """How many logprobs → the rows that report so many of the model's own."""
        self.processed_rows: list[int] = []
        """The rows that report those of the distribution they were drawn from."""
        self.reporting_beams: dict[int, int] = {}
        """Beams that report: row → how many logprobs."""
        for row, state in enumerate(states):
            if state.params.logprobs is None:
                continue
            if state.draw is Draw.BEAM:
                self.reporting_beams[row] = state.params.logprobs
            elif state.params.logprobs_mode == "raw_logprobs":
                self.logprob_rows[state.params.logprobs].append(row)
            else:
                self.processed_rows.append(row)
        self.only_draws = not (
            self.processors.any or self.edits.any or self.logprob_rows or self.processed_rows or Draw.BEAM in draws
        )
        """Whether logits are drawn from as they are, and tokens are all that is asked for."""
        self._keys: NDArray[np.uint64] = stream_keys(
            [state.seed for state in states], [state.sample_index for state in states]
        )

    def uniforms(self) -> FloatArray:
        """One number in [0, 1) per sequence, for its next token; zeros if none is left to chance."""
        if self._output_token_ids is None:
            return self._zeros
        return uniforms(self._keys, np.array([len(ids) for ids in self._output_token_ids], dtype=np.uint64))


def split_by_logprobs(states: Sequence[SamplingState], vocab_size: int, logprobs_memory: int) -> list[slice]:
    """Pieces of a batch whose log-probabilities fit `logprobs_memory` bytes each; one piece where none are asked for.

    A row is drawn from its own values alone, so it does not notice where the batch is cut.
    """
    pieces: list[slice] = []
    start, taken = 0, 0
    for row, state in enumerate(states):
        if state.params.logprobs is not None:
            needed = logprob_bytes(vocab_size, state.params.logprobs)
            if taken and taken + needed > logprobs_memory:
                pieces.append(slice(start, row))
                start, taken = row, 0
            taken += needed
    return [*pieces, slice(start, len(states))]


def _group_rows(states: Sequence[SamplingState], vocab_size: int) -> list[RowGroup]:
    by_need: defaultdict[tuple[Draw, int], list[int]] = defaultdict(list)
    for row, state in enumerate(states):
        # Rows of similar k go together: the largest k of a group is what its rows are searched for.
        size_class = max(64, state.params.top_k - 1).bit_length() if state.draw is Draw.TOP_K else 0
        by_need[state.draw, size_class].append(row)
    return [
        RowGroup(draw, part, states) for (draw, _), rows in by_need.items() for part in split_rows(rows, vocab_size)
    ]
