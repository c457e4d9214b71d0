"""Breaker: how long to wait before an engine process that died is replaced."""

MAX_DELAY = 60.0


class Breaker:
    """Counts deaths in a row without progress between them. The first is free; then 1, 2, 4, … `MAX_DELAY` seconds."""

    def __init__(self) -> None:
        self.num_deaths = 0
        """Deaths in a row without progress."""

    def count_death(self, *, progress: bool) -> float:
        """Seconds to wait after a death. `progress`: something was computed since the one before it."""
        self.num_deaths = 0 if progress else self.num_deaths + 1
        return 0.0 if self.num_deaths < 2 else min(MAX_DELAY, 2.0 ** min(self.num_deaths - 2, 10))
