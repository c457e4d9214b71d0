"""LogitEdits: the changes that the requests of one batch make to their logits before sampling.

In vLLM's order: the grammar's mask, allowed_token_ids, bad_words and min_tokens, logit_bias, then the repetition,
frequency and presence penalties. The mask touches whole rows; all others touch few tokens of a row and are scattered
writes at flat indices (row * vocab_size + token).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.sampling.row_index import row_index, split_rows
from quire.sampling.state import SamplingState
from quire.sampling.structured_output import MaskPenalties


class Counted(NamedTuple):
    """The tokens that are penalised: how many each row has, their ids, and how often each was generated."""

    lengths: list[int]
    ids: NDArray[np.int64]
    num_generated: NDArray[np.float32]


class StepEdits(NamedTuple):
    """What changes from token to token."""

    banned: NDArray[np.int64]
    """Flat indices."""
    counted: Counted | None


class LogitEdits:
    """Built once per batch. Each step reads from the states only what changes from token to token."""

    def __init__(self, states: Sequence[SamplingState], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        rows = list(enumerate(states))
        allowed = [(row, state.allowed_ids) for row, state in rows if state.allowed_ids is not None]
        self._allowed_rows = [row for row, _ in allowed]
        self._allowed = self._flat_indices([(row, id) for row, ids in allowed for id in ids])
        self._banning = [(row, state) for row, state in rows if state.bad_words or state.ending_ids]
        grammars = {row: state.grammar for row, state in rows if state.grammar is not None}
        self._grammars = [
            (row_index(rows), MaskPenalties([grammars[row] for row in rows], vocab_size))
            for rows in split_rows(list(grammars), vocab_size)
        ]
        self._masked_rows = sorted({*self._allowed_rows, *(row for row, _ in self._banning)})
        self._biased = self._flat_indices([(row, id) for row, state in rows for id in state.bias_by_id])
        self._biases = np.array([b for state in states for b in state.bias_by_id.values()], dtype=np.float32)
        counted = [(row, state) for row, state in rows if state.token_counts is not None]
        self._row_starts = np.array([row * vocab_size for row, _ in counted], dtype=np.int64)
        self._counts = [state.token_counts for _, state in counted if state.token_counts is not None]
        strengths = [
            (state.params.repetition_penalty, state.params.frequency_penalty, state.params.presence_penalty)
            for _, state in counted
        ]
        self._strengths = np.array(strengths, dtype=np.float32).reshape(-1, 3)
        self.any = bool(self._masked_rows or self._grammars or self._biased.size or self._counts)
        """True if `apply` changes anything."""

    def read(self) -> StepEdits:
        """What the states ask for in this step. Raises whatever a faulty state does, before any logit is changed."""
        banned = [(row, id) for row, state in self._banning for id in state.banned_ids()]
        if not self._counts:
            return StepEdits(self._flat_indices(banned), None)
        ids = np.concatenate([np.frombuffer(counts.ids, dtype=np.int64) for counts in self._counts])
        generated = np.concatenate([np.frombuffer(c.num_generated, dtype=np.float32) for c in self._counts])
        return StepEdits(self._flat_indices(banned), Counted([len(c.ids) for c in self._counts], ids, generated))

    def apply(self, logits: NDArray[np.float32], step: StepEdits) -> None:
        """Edit `logits` [rows, vocabulary] in place. A row that holds NaN or +inf still does afterwards."""
        flat = logits.reshape(-1)
        faulty = [row for row in self._masked_rows if not logits[row].max() < np.inf]
        with np.errstate(invalid="ignore"):  # +inf − inf is NaN, which marks the row as faulty
            for index, penalties in self._grammars:
                logits[index] += penalties.compute()
        if self._allowed_rows:
            kept = flat[self._allowed]
            logits[self._allowed_rows] = -np.inf
            flat[self._allowed] = kept
        if self._banning:
            flat[step.banned] = -np.inf
        if self._biased.size:
            flat[self._biased] += self._biases
        if step.counted is not None:
            self._apply_penalties(flat, step.counted)
        logits[faulty] = np.nan

    def _apply_penalties(self, flat: NDArray[np.float32], counted: Counted) -> None:
        lengths, ids, generated = counted
        repetition, frequency, presence = np.repeat(self._strengths, lengths, axis=0).T
        indices = np.repeat(self._row_starts, lengths) + ids
        values = flat[indices]
        # An overflow to −inf rules the token out; an overflow to +inf makes the row fail when it is sampled.
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / repetition, values * repetition)
        values -= frequency * generated
        values -= presence * (generated > 0)
        flat[indices] = values

    def _flat_indices(self, cells: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        rows, ids = np.array(cells, dtype=np.int64).reshape(-1, 2).T
        return np.asarray(rows * self._vocab_size + ids)
