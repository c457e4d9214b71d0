"""TenantPace: how much a step computes of the prompts of heavy tenants. Another tenant waits for the end of the step.

A tenant that asks little is admitted at once (`fair_share`), but its request waits for the end of the running step, and
its own step computes other prompts, too. While such tenants are about, a step takes no more of the prompts of heavy
tenants than a share of the time in which the others lately got their first token.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from quire.scheduler.learned_size import FirstTokenTimes, LearnedSize
from quire.scheduler.sequence import Sequence, SequenceGroup
from quire.scheduler.waiting_queue import WaitingQueue

MIN_TOKENS = 8
"""Tokens of prompts of heavy tenants that a step always takes: they go on however slow the machine is."""
ABOUT_SECONDS = 60.0
"""Time after the last first token of a tenant that asks little for which another request of it is expected."""

_Part = tuple[list[Sequence], int]


class TenantPace:
    """Owned by the scheduler."""

    def __init__(self, clock: Callable[[], float], delay: float, waiting: WaitingQueue) -> None:
        """`delay`: the share of the time to a first token by which heavy tenants may delay it."""
        self._clock = clock
        self._delay = delay / 2  # a request waits for the running step and for its own
        self._waiting = waiting
        self._size = LearnedSize(MIN_TOKENS)
        self._first_tokens = FirstTokenTimes(clock, ABOUT_SECONDS)
        self._heavy: frozenset[str] = frozenset()
        self._began: tuple[int, float, float] | None = None
        """Tokens of heavy tenants' prompts in the running step, the time they should take, and the step's start."""

    def note_first_token(self, group: SequenceGroup, seconds: float) -> None:
        """A group got its first token so long after its prompt was begun."""
        if self._heavy and group.request.tenant not in self._heavy:
            self._first_tokens.note(seconds)

    def budget(self, running: SequenceOf[SequenceGroup], num_tokens: int) -> "PromptBudget":
        """What the next step may compute of prompts: `num_tokens` in all."""
        self._heavy = self._waiting.heavy_tenants(running)
        if not (self._heavy and self._first_tokens.are_recent):
            return PromptBudget(num_tokens)
        return PromptBudget(num_tokens, self._heavy, min(num_tokens, self._size.num_tokens))

    def begin(self, num_heavy_tokens: int) -> None:
        """A step with so many tokens of prompts of heavy tenants begins."""
        if num_heavy_tokens:
            self._began = (num_heavy_tokens, self._delay * self._first_tokens.median, self._clock())

    def end(self) -> None:
        """The step has ended, or another one has whose result came first."""
        if self._began is not None:
            num_tokens, wanted, start = self._began
            self._began = None
            self._size.learn(num_tokens, self._clock() - start, wanted)


class PromptBudget:
    """Tokens of prompts that one step computes, and what it was asked for so far."""

    def __init__(self, num_tokens: int, heavy: frozenset[str] = frozenset(), num_heavy_tokens: int = 0) -> None:
        """`num_heavy_tokens` of `num_tokens` may be those of the tenants in `heavy`."""
        self.num_tokens = num_tokens
        self._heavy = heavy
        self._num_heavy_tokens = num_heavy_tokens
        self._num_prompts = [0, 0]
        self._wanted = [0, 0]
        """Tokens that prompts lack, of tenants that are not heavy and of those that are."""

    @property
    def num_wanted(self) -> int:
        """Tokens that the prompts of the step lack."""
        return sum(self._wanted)

    def add(self, sequence: Sequence) -> None:
        """The step may compute tokens of this sequence."""
        kind = self.is_heavy(sequence.group)
        self._num_prompts[kind] += 1
        self._wanted[kind] += sequence.num_missing_tokens

    def has_room(self, group: SequenceGroup, max_num_partial_prefills: int) -> bool:
        """Whether a share for the group's prompt would be worth having."""
        kind = self.is_heavy(group)
        num_tokens, num_prompts = (self._num_heavy_tokens if kind else self.num_tokens), self._num_prompts[kind]
        return num_prompts < num_tokens and (self._wanted[kind] < num_tokens or num_prompts < max_num_partial_prefills)

    def parts(self, sequences: list[Sequence]) -> tuple[_Part, _Part]:
        """The sequences that share tokens, and how many: those of tenants that are not heavy, then those of others."""
        if not self._heavy:
            return (sequences, self.num_tokens), ([], 0)
        heavy = [sequence for sequence in sequences if self.is_heavy(sequence.group)]
        others = [sequence for sequence in sequences if not self.is_heavy(sequence.group)]
        wanted = sum(sequence.num_missing_tokens for sequence in heavy)
        # Heavy tenants get their tokens in any case: they must not starve either.
        num_heavy = min(wanted, self._num_heavy_tokens)
        return (others, self.num_tokens - num_heavy), (heavy, num_heavy)

    def is_heavy(self, group: SequenceGroup) -> bool:
        """Whether the group's tenant is heavy."""
        return group.request.tenant in self._heavy
