"""BackgroundPace: keeps steps with prompts of the background short: a client that arrives waits for their end."""

from collections.abc import Callable

STEP_SECONDS = 0.05
"""What a step with prompts of the background should take. A client's first token comes this much later at most."""
MIN_TOKENS = 32
"""Tokens of prompts that such a step always takes: the background goes on however slow the machine is."""


class BackgroundPace:
    """Learns how many tokens of prompts a step computes in `STEP_SECONDS`, from the steps before."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_tokens = 2 * MIN_TOKENS
        self._began: tuple[int, float] | None = None
        """Tokens and start of a step that it bounds and that runs."""

    def bound(self, num_tokens: int) -> int:
        """The most tokens of prompts for the next step, of `num_tokens` that it could take."""
        return min(num_tokens, self._num_tokens)

    def begin(self, num_tokens: int) -> None:
        """A bounded step begins with so many tokens of prompts."""
        self._began = (num_tokens, self._clock())

    def end(self) -> None:
        """The step has ended, or another one has whose result came first."""
        if self._began is None:
            return
        num_tokens, start = self._began
        self._began = None
        seconds = self._clock() - start
        if seconds > STEP_SECONDS:
            self._num_tokens = max(MIN_TOKENS, int(num_tokens * STEP_SECONDS / seconds))
        elif num_tokens >= self._num_tokens:
            self._num_tokens += 1 + self._num_tokens // 4
