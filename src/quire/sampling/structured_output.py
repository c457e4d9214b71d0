"""Structured output in sampling: where each sequence is in its grammar, and which tokens that forbids.

`GrammarState` follows one sequence. `MaskWorker` computes the masks of a step in a thread of its own while the model
runs; `LogitEdits` applies them with everything else that rules tokens out.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from quire.grammar.compiled import Grammar, Matcher

INLINE_WORDS = 2**11
"""Up to this many words, the masks of a step cost less than handing them to a thread: 64 rows of 1,024 tokens."""


class GrammarState:
    """One sequence's place in its grammar; `append` is its only writer.

    A state that was given the output so far equals one that followed it token by token. An error of the grammar, such
    as one that takes too much, ends this sequence alone: nothing is allowed any more, and `error` says why.
    """

    __slots__ = ("_matcher", "banned_ids", "error", "fast_forwards", "forbidden", "grammar")

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
        """Whether tokens that the grammar forces may be taken without asking the model."""
        self.banned_ids = list(banned_ids)
        """Tokens that are never allowed, whatever the grammar says: end tokens that the request ignores."""
        self.error = error
        self.forbidden: NDArray[np.bool_] | None = None
        """[vocabulary]: what may not come next, as `MaskWorker` computed it for the present step."""
        self._matcher: Matcher | None = None
        if grammar is not None:
            self._matcher = grammar.matcher()
            if output_token_ids:
                self._matcher.consume_tokens(list(output_token_ids))
            self.note_error()

    @property
    def matcher(self) -> Matcher | None:
        """For a mask; None after an error."""
        return self._matcher if self.error is None else None

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing can follow it."""
        return self.error is None and self._matcher is not None and self._matcher.is_stopped()

    def append(self, token_id: int) -> None:
        """Follow a token that the sequence generated."""
        if self.matcher is not None:
            self.matcher.consume_token(token_id)
            self.note_error()

    def lets_follow(self, token_id: int) -> bool:
        """Whether a token may come next."""
        return self.matcher is not None and self.matcher.validate_tokens([token_id]) == 1

    @property
    def has_choice(self) -> bool:
        """Whether the next token is to be drawn: the text is not whole, and `take_forced` would take nothing."""
        forces = self._may_force and self._matcher is not None and self._matcher.compute_ff_tokens()
        return not forces and not self.complete

    def take_forced(self, limit: int) -> list[int]:
        """Follow the tokens that must come next, at most `limit`, as the tokenizer would write their text.

        Empty where there is a choice, of texts or of how to write one.
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
        """A copy that goes its own way."""
        copy = GrammarState(None, fast_forwards=self.fast_forwards, banned_ids=self.banned_ids, error=self.error)
        copy.grammar = self.grammar
        copy._matcher = self._matcher.deep_copy() if self._matcher is not None else None
        copy.forbidden = self.forbidden
        return copy

    def note_error(self) -> None:
        """Take over what the matcher found wrong with itself."""
        if self._matcher is not None and self.error is None and self._matcher.is_error():
            if self.grammar is not None:
                self.grammar.worn = True
            self.error = f"the grammar of structured_outputs failed: {' '.join(self._matcher.get_error().split())}"


class _MaskFiller(Protocol):
    """What is used of llguidance's LLExecutor: masks of many matchers at once, written where a pointer points."""

    def unsafe_compute_mask_ptr(
        self, matchers: list[tuple[Matcher, int]], pointer: int, row_bytes: int, num_rows: int, /
    ) -> None: ...


class MaskWorker:
    """Computes the masks of all sequences of a step that follow a grammar: `start`, run the model, `join`."""

    def __init__(self, vocab_size: int, *, num_threads: int = 1) -> None:
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        self._thread: ThreadPoolExecutor | None = None
        self._executor: _MaskFiller | None = None
        self._running: Future[None] | None = None
        self._bits: NDArray[np.uint32] = np.empty((0, 0), dtype=np.uint32)
        self._forbidden: NDArray[np.bool_] = np.empty((0, 0), dtype=np.bool_)

    def start(self, states: Sequence[GrammarState]) -> None:
        """Begin; until `join` the states belong to the worker. Costs nothing for no states."""
        num_words = sum(state.grammar.num_mask_words for state in states if state.grammar is not None)
        if num_words <= INLINE_WORDS:
            if states:
                self.fill(states)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-masks")
        self._running = self._thread.submit(self.fill, states)

    def join(self) -> None:
        """Return when `forbidden` of every state is filled."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def fill(self, states: Sequence[GrammarState]) -> None:
        """Set `forbidden` of each state, as a view of one array that the next call overwrites."""
        following = [(state.matcher, row) for row, state in enumerate(states) if state.matcher is not None]
        num_words = max((state.grammar.num_mask_words for state in states if state.grammar is not None), default=1)
        self._make_room(len(states), num_words)
        bits, forbidden = self._bits[: len(states)], self._forbidden[: len(states)]
        if following:
            if self._executor is None:
                from llguidance import LLExecutor  # only where there is a grammar

                self._executor = cast(_MaskFiller, LLExecutor(self._num_threads))
            self._executor.unsafe_compute_mask_ptr(following, bits.ctypes.data, 4 * num_words, len(bits))
            allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
            np.equal(allowed, 0, out=forbidden)
        for row, state in enumerate(states):
            state.note_error()
            if state.error is not None:
                forbidden[row] = True
            elif state.banned_ids and not state.complete:
                forbidden[row, state.banned_ids] = True
            state.forbidden = forbidden[row]

    def _make_room(self, num_rows: int, num_words: int) -> None:
        if num_rows > len(self._bits) or num_words != self._bits.shape[1]:
            num_rows = 1 << (num_rows - 1).bit_length()
            self._bits = np.zeros((num_rows, num_words), dtype=np.uint32)
            self._forbidden = np.zeros((num_rows, self._vocab_size), dtype=np.bool_)
