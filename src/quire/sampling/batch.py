"""SamplingBatch: what a list of sequences asks of sampling, gathered into arrays and grouped by need.

In decode the same sequences come again step after step, so the gathering is done once and only positions are read anew.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.cpu import sample_tokens, row_argmax
from quire.sampling.logit_edits import LogitEdits
from quire.sampling.logits_processors import BatchLogitsProcessor, LogitsProcessing
from quire.sampling.row_places import place_of, split_rows
from quire.sampling.state import Draw, SamplingState
from quire.sampling.uniforms import stream_keys, uniforms
from quire.step import logprob_bytes

FloatArray = NDArray[np.float64]


class RowGroup:
    """Rows whose tokens are found in the same way."""

    def __init__(self, rows: Sequence[int], states: Sequence[SamplingState]) -> None:
        """`rows` are all greedy, all beams or none of either."""
        draw = states[rows[0]].draw
        self.rows = list(rows)
        self.place = place_of(rows)
        self.is_beam, self._is_greedy = draw is Draw.BEAM, draw is Draw.GREEDY
        # Tensors that stay step after step, and the memory of the last two as arrays.
        self._peaks, self._ids = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.int32)
        self._arrays = self._ids.numpy(), self._peaks.numpy()
        if self.is_beam or self._is_greedy:
            return
        params = [states[row].params for row in rows]
        top_k = [states[row].params.top_k if states[row].draw is Draw.TOP_K else 0 for row in rows]
        self._limits = (
            torch.tensor([p.temperature for p in params], dtype=torch.float32),
            torch.tensor([p.min_p for p in params], dtype=torch.float32),
            torch.tensor(top_k, dtype=torch.int32),
            torch.tensor([p.top_p for p in params], dtype=torch.float64),
        )

    def find(self, logits: Tensor, uniforms: FloatArray) -> tuple[list[int], list[float]]:
        """A token and the highest logit of each row of the group; where that is not finite, the token is void."""
        if self._is_greedy:
            row_argmax(logits, self._peaks, self._ids)  # of equals the lowest id
        else:
            sample_tokens(logits, *self._limits, torch.from_numpy(uniforms), self._peaks, self._ids)
        ids, peaks = self._arrays
        return ids.tolist(), peaks.tolist()


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
        draws = {state.draw for state in states}
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
    greedy = [row for row, state in enumerate(states) if state.draw is Draw.GREEDY]
    beams = [row for row, state in enumerate(states) if state.draw is Draw.BEAM]
    others = [row for row, state in enumerate(states) if state.draw not in (Draw.GREEDY, Draw.BEAM)]
    # What beams are ranked by takes temporaries as large as their logits.
    return [RowGroup(rows, states) for rows in (greedy, others, *split_rows(beams, vocab_size)) if rows]
