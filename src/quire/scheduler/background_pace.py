"""BackgroundPace: how much a step may take of the background. A client that arrives waits for the end of the step.

While clients are about, a step with rows or prompts of the background should take no more than a share of the time in
which clients lately got their first token. When none was seen for a while, a step with prompts of the background takes
`STEP_SECONDS`, and its decoding rows are not bounded. The tokens that such a step holds are learned from the steps
before.
"""

from collections.abc import Callable

from quire.scheduler.learned_size import FirstTokenTimes, LearnedSize

STEP_SECONDS = 0.05
"""What a step with prompts of the background takes while no client is about."""
MIN_TOKENS = 32
"""Tokens of prompts that such a step always takes: the background goes on however slow the machine is."""
MIN_SHARED_TOKENS = 8
"""The same while clients are about; decoding rows count, too."""
ABOUT_SECONDS = 10.0
"""Time after a client's last first token for which others are expected."""


class BackgroundPace:
    """Amounts are in tokens: one of each decoding row, and those of prompts."""

    def __init__(self, clock: Callable[[], float], delay: float) -> None:
        """`delay`: the share of the time to a first token by which the background may delay it."""
        self._clock = clock
        self._delay = delay
        self._alone = LearnedSize(MIN_TOKENS)
        self._shared = LearnedSize(MIN_SHARED_TOKENS)
        self._first_tokens = FirstTokenTimes(clock, ABOUT_SECONDS)
        self._began: tuple[LearnedSize, int, float, float] | None = None
        """What learns from the step that runs, its tokens of the background, the time it should take, its start."""

    @property
    def _shares(self) -> bool:
        return self._first_tokens.are_recent

    def note_first_token(self, seconds: float) -> None:
        """A client got its first token so long after its prompt was begun."""
        self._first_tokens.note(seconds)

    def num_rows(self, num_rows: int) -> int:
        """The most rows that the background may have, of `num_rows`; a quarter of a step is left to prompts."""
        return max(1, min(num_rows, self._shared.num_tokens * 3 // 4)) if self._shares else num_rows

    def most_rows(self, num_rows: int) -> int:
        """As `num_rows`, for rows that run already: those beyond lose their memory. A bound that moves a little must
        not make rows come and go."""
        return max(1, min(num_rows, self._shared.num_tokens)) if self._shares else num_rows

    def num_prompt_tokens(self, num_tokens: int, num_rows: int) -> int:
        """The most tokens of prompts for the next step, of `num_tokens` that it could take, beside `num_rows` decoding
        rows of the background."""
        size = max(1, self._shared.num_tokens - num_rows) if self._shares else self._alone.num_tokens
        return min(num_tokens, size)

    def begin(self, num_prompt_tokens: int, num_rows: int) -> None:
        """A step of the background begins with so many tokens of prompts and decoding rows."""
        if self._shares:
            seconds = self._delay * self._first_tokens.median
            self._began = (self._shared, num_prompt_tokens + num_rows, seconds, self._clock())
        elif num_prompt_tokens:
            self._began = (self._alone, num_prompt_tokens, STEP_SECONDS, self._clock())

    def end(self) -> None:
        """The step has ended, or another one has whose result came first."""
        if self._began is not None:
            size, num_tokens, wanted, start = self._began
            self._began = None
            size.learn(num_tokens, self._clock() - start, wanted)
