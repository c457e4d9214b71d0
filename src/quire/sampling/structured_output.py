"""Structured output in sampling: each sequence's place in its grammar, and the tokens that the grammar allows there.

`GrammarState` tracks one sequence. `MaskWorker` computes the masks of a step in its own thread while the model runs.
`LogitEdits` applies them with the other edits.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from quire.errors import GRAMMAR_FAILED
from quire.grammar.compiled import Grammar, Matcher

INLINE_WORDS = 2**11
"""Masks of up to this many words (64 rows of 1,024 tokens) take less time than handing them to a thread."""
_PENALTIES = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_PENALTIES = _PENALTIES.astype(np.float32)
"""[256, 8]: what each byte of a mask adds to the logits of its eight tokens."""


class GrammarState:
    """One sequence's place in its grammar. Its own methods are its only writers, but for `allowed`.

    A state built with the output so far equals one that got the output token by token. An error of the grammar, such
    as one over its limits, ends this sequence alone: no token is allowed any more, and `error` says why.
    """

    __slots__ = ("_matcher", "allowed", "banned_ids", "error", "fast_forwards", "grammar")

    def __init__(
        self,
        grammar: Grammar | None,
        output_token_ids: Sequence[int] = (),
        *,
        fast_forwards: bool = False,
        banned_ids: Sequence[int] = (),
        error: str | None = None,
    ) -> None:
        """Either a grammar or an error."""
        self.grammar = grammar
        self.fast_forwards = fast_forwards
        """True if tokens that the grammar forces may be added without running the model."""
        self.banned_ids = list(banned_ids)
        """End tokens that the request ignores: not allowed, whatever the grammar says."""
        self.error = error
        self.allowed: NDArray[np.uint32] | None = None
        """[words of 32 tokens], lowest bit first: the tokens allowed in this step. `MaskWorker` writes it."""
        self._matcher: Matcher | None = None
        if grammar is not None:
            self._matcher = grammar.matcher()
            if output_token_ids:
                self._matcher.consume_tokens(list(output_token_ids))
            self.note_error()

    @property
    def matcher(self) -> Matcher | None:
        """None after an error."""
        return self._matcher if self.error is None else None

    @property
    def complete(self) -> bool:
        """True if the text is complete and no token may follow."""
        return self.error is None and self._matcher is not None and self._matcher.is_stopped()

    def append(self, token_id: int) -> None:
        """Advance by a generated token."""
        if self.matcher is not None and not self.matcher.consume_token(token_id):
            self.note_error()

    def allows(self, token_id: int) -> bool:
        """True if the token may come next."""
        return self.matcher is not None and self.matcher.validate_tokens([token_id]) == 1

    @property
    def has_choice(self) -> bool:
        """True if the next token must be sampled: the text is not complete, and `take_forced` would return nothing."""
        forces = self._may_force and self._matcher is not None and self._matcher.compute_ff_tokens()
        return not forces and not self.complete

    def take_forced(self, limit: int) -> list[int]:
        """Advance by the tokens that must come next, at most `limit`, as the tokenizer would encode their text.

        Empty if there is a choice between texts or between encodings of the text.
        """
        if not self._may_force or self.matcher is None:
            return []
        forced = self.matcher.compute_ff_tokens()[:limit]
        if forced:
            self.matcher.consume_tokens(forced)
            self.note_error()
        return forced

    @property
    def _may_force(self) -> bool:
        return self.fast_forwards and self.matcher is not None and not self.matcher.is_stopped()

    def fork(self) -> "GrammarState":
        """An independent copy."""
        copy = GrammarState(None, fast_forwards=self.fast_forwards, banned_ids=self.banned_ids, error=self.error)
        copy.grammar = self.grammar
        copy._matcher = self._matcher.deep_copy() if self._matcher is not None else None
        copy.allowed = self.allowed
        return copy

    def note_error(self) -> None:
        """Copy the matcher's error, if it has one, to `error`."""
        if self._matcher is not None and self.error is None and self._matcher.is_error():
            if self.grammar is not None:
                self.grammar.worn = True
            self.error = f"{GRAMMAR_FAILED}: {' '.join(self._matcher.get_error().split())}"


class _MaskFiller(Protocol):
    """The part of llguidance's LLExecutor that is used: it writes the masks of many matchers to a pointer."""

    def unsafe_compute_mask_ptr(
        self, matchers: list[tuple[Matcher, int]], pointer: int, row_bytes: int, num_rows: int, /
    ) -> None: ...


class MaskWorker:
    """Computes the masks of all grammars of a step while the model runs: `start`, run the model, `join`."""

    def __init__(self, vocab_size: int, *, num_threads: int = 1) -> None:
        self._num_words = _num_words(vocab_size)
        self._num_threads = num_threads
        self._thread: ThreadPoolExecutor | None = None
        self._executor: _MaskFiller | None = None
        self._running: Future[None] | None = None
        self._masks: NDArray[np.uint32] = np.empty((0, 0), dtype=np.uint32)

    def start(self, states: Sequence[GrammarState]) -> None:
        """Begin to compute masks. The states belong to the worker until `join`. Without states it does nothing."""
        num_words = sum(state.grammar.num_mask_words for state in states if state.grammar is not None)
        if num_words <= INLINE_WORDS:
            if states:
                self._fill(states, None)
            return
        if self._thread is None or self._executor is None:
            from llguidance import LLExecutor  # loaded with the first large mask

            self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-masks")
            self._executor = cast(_MaskFiller, LLExecutor(self._num_threads))
        self._running = self._thread.submit(self._fill, states, self._executor)

    def join(self) -> None:
        """Return when `allowed` of every state is filled."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def _fill(self, states: Sequence[GrammarState], executor: _MaskFiller | None) -> None:
        """Set `allowed` of each state, as a view of one array that the next call overwrites."""
        num_words = max(state.grammar.num_mask_words if state.grammar else self._num_words for state in states)
        if len(states) > len(self._masks) or num_words != self._masks.shape[1]:
            self._masks = np.zeros((1 << (len(states) - 1).bit_length(), num_words), dtype=np.uint32)
        pointer, row_bytes = self._masks.ctypes.data, 4 * num_words
        matchers = [(state.matcher, row) for row, state in enumerate(states) if state.matcher is not None]
        if executor is None:
            for matcher, row in matchers:
                matcher.unsafe_compute_mask_ptr(pointer + row * row_bytes, row_bytes)
        elif matchers:
            executor.unsafe_compute_mask_ptr(matchers, pointer, row_bytes, len(self._masks))
        for state, mask in zip(states, self._masks, strict=False):
            state.note_error()
            if state.error is not None:
                mask[:] = 0
            elif state.banned_ids and not state.complete:
                for token_id in state.banned_ids:
                    mask[token_id // 32] &= ~np.uint32(1 << token_id % 32)
            state.allowed = mask[: self._num_words]  # a tokenizer may have more tokens than its model


class MaskPenalties:
    """What the grammar masks of some sequences add to their logits, computed into the same memory at each step."""

    def __init__(self, states: Sequence[GrammarState], vocab_size: int) -> None:
        self._states = states
        self._masks: NDArray[np.uint32] = np.empty((len(states), _num_words(vocab_size)), dtype=np.uint32)
        self._penalties: NDArray[np.float32] = np.empty((*self._masks.shape, 4, 8), dtype=np.float32)
        self._by_token = self._penalties.reshape(len(states), -1)[:, :vocab_size]

    def compute(self) -> NDArray[np.float32]:
        """[states, vocab_size]: 0 or −inf. Needs the masks of this step; the next call overwrites the result."""
        masks = [state.allowed for state in self._states if state.allowed is not None]
        np.concatenate(masks, out=self._masks.reshape(-1))
        mask_bytes = self._masks.view(np.uint8).reshape(self._penalties.shape[:3])
        # No byte is out of range. mode="clip" makes numpy write to `out` directly instead of through a copy.
        _PENALTIES.take(mask_bytes, axis=0, out=self._penalties, mode="clip")
        return self._by_token


def _num_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)
