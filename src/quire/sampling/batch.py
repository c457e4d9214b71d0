"""SamplingBatch: the sampling parameters of a list of sequences as arrays, with the rows grouped by what they need.

In steady decode the same sequences return in every step. The arrays are built once, and each step reads only the
sequences' positions.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.interface import Kernels
from quire.sampling.logit_edits import LogitEdits
from quire.sampling.logits_processors import BatchLogitsProcessor, LogitsProcessing
from quire.sampling.row_index import row_index, split_rows
from quire.sampling.state import SamplingMode, SamplingState
from quire.sampling.uniforms import stream_keys, uniforms
from quire.step import logprob_bytes

FloatArray = NDArray[np.float64]


class RowGroup:
    """Rows whose tokens are found by the same operation."""

    def __init__(self, rows: Sequence[int], states: Sequence[SamplingState], kernels: Kernels) -> None:
        """`rows` are all greedy, all beams, or none of either."""
        mode = states[rows[0]].mode
        self.rows = list(rows)
        self.index = row_index(rows)
        self.is_beam, self._is_greedy = mode is SamplingMode.BEAM, mode is SamplingMode.GREEDY
        self._kernels = kernels
        # Output tensors, used again in every step, and the same memory as arrays.
        self._max_logits, self._ids = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.int32)
        self._arrays = self._ids.numpy(), self._max_logits.numpy()
        if self.is_beam or self._is_greedy:
            return
        params = [states[row].params for row in rows]
        top_k = [states[row].params.top_k if states[row].mode is SamplingMode.TOP_K else 0 for row in rows]
        self._filters = (
            torch.tensor([p.temperature for p in params], dtype=torch.float32),
            torch.tensor([p.min_p for p in params], dtype=torch.float32),
            torch.tensor(top_k, dtype=torch.int32),
            torch.tensor([p.top_p for p in params], dtype=torch.float64),
        )

    def sample(self, logits: Tensor, uniforms: FloatArray) -> tuple[list[int], list[float]]:
        """A token and the highest logit of each row of the group. The token of a row whose highest logit is not finite
        means nothing."""
        if self._is_greedy:
            self._kernels.row_argmax(logits, self._max_logits, self._ids)  # the lowest id among equals
        else:
            self._kernels.sample_tokens(logits, *self._filters, torch.from_numpy(uniforms), self._max_logits, self._ids)
        ids, max_logits = self._arrays
        return ids.tolist(), max_logits.tolist()


class SamplingBatch:
    """The groups, logit edits, log-probability requests and random streams of one list of sequences."""

    def __init__(
        self,
        states: Sequence[SamplingState],
        vocab_size: int,
        kernels: Kernels,
        logits_processors: Sequence[BatchLogitsProcessor] = (),
    ) -> None:
        self.states = list(states)
        self.processors = LogitsProcessing(self.states, logits_processors)
        self.edits = LogitEdits(states, vocab_size)
        self.groups = _group_rows(self.states, vocab_size, kernels)
        modes = {state.mode for state in states}
        is_random = not modes <= {SamplingMode.GREEDY, SamplingMode.BEAM}
        self._outputs = [state.output_token_ids for state in states] if is_random else None
        """The output of each sequence, whose length is the position to sample at; None if nothing is random."""
        self._zeros: FloatArray = np.zeros(len(states))
        self.logprob_rows: defaultdict[int, list[int]] = defaultdict(list)
        """Number of log-probabilities → the rows that ask for that many raw ones."""
        self.processed_rows: list[int] = []
        """Rows that ask for processed log-probabilities."""
        self.logprob_beams: dict[int, int] = {}
        """Row of a beam that asks for log-probabilities → how many."""
        for row, state in enumerate(states):
            if state.params.logprobs is None:
                continue
            if state.mode is SamplingMode.BEAM:
                self.logprob_beams[row] = state.params.logprobs
            elif state.params.logprobs_mode == "raw_logprobs":
                self.logprob_rows[state.params.logprobs].append(row)
            else:
                self.processed_rows.append(row)
        self.needs_tokens_only = not (
            self.processors.any
            or self.edits.any
            or self.logprob_rows
            or self.processed_rows
            or SamplingMode.BEAM in modes
        )
        """True if tokens are sampled from the model's logits as they are, and nothing else is asked for."""
        self._keys: NDArray[np.uint64] = stream_keys(
            [state.seed for state in states], [state.sample_index for state in states]
        )

    def uniforms(self) -> FloatArray:
        """One number in [0, 1) per sequence for its next token; zeros if no row is random."""
        if self._outputs is None:
            return self._zeros
        return uniforms(self._keys, np.array([len(ids) for ids in self._outputs], dtype=np.uint64))


def split_by_logprobs(states: Sequence[SamplingState], vocab_size: int, logprobs_memory: int) -> list[slice]:
    """Slices of a batch whose log-probabilities need at most `logprobs_memory` bytes each; one if none are asked for.

    A row's token depends on that row alone, so the cuts change no token.
    """
    pieces: list[slice] = []
    start, num_bytes = 0, 0
    for row, state in enumerate(states):
        if state.params.logprobs is not None:
            needed = logprob_bytes(vocab_size, state.params.logprobs)
            if num_bytes and num_bytes + needed > logprobs_memory:
                pieces.append(slice(start, row))
                start, num_bytes = row, 0
            num_bytes += needed
    return [*pieces, slice(start, len(states))]


def _group_rows(states: Sequence[SamplingState], vocab_size: int, kernels: Kernels) -> list[RowGroup]:
    greedy = [row for row, state in enumerate(states) if state.mode is SamplingMode.GREEDY]
    beams = [row for row, state in enumerate(states) if state.mode is SamplingMode.BEAM]
    random = [row for row, state in enumerate(states) if state.mode not in (SamplingMode.GREEDY, SamplingMode.BEAM)]
    # Ranking beams takes temporaries as large as their logits, so their groups are small.
    return [RowGroup(rows, states, kernels) for rows in (greedy, random, *split_rows(beams, vocab_size)) if rows]
