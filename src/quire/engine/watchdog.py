"""Watchdog: measures for how long a process that has work does not advance. It decides nothing and ends nothing."""

LOOK_SECONDS = 0.25
"""Time between two looks."""
BUSY_FACTOR = 10.0
"""A process that works without advancing may take this much longer than one that does nothing at all."""
STEP_FACTOR = 20.0
"""A step may take this much longer than the longest one lately."""
_LEAST_SHARE = 0.01
"""A process that gets less of a CPU does nothing."""


class Watchdog:
    """One process, looked at every `LOOK_SECONDS` while it has work."""

    def __init__(self) -> None:
        self._last: tuple[float, object, float | None] | None = None
        """Time, sign of progress and work done at the last look."""
        self._still = 0.0
        self._stalled = 0.0

    @property
    def stalled(self) -> float:
        """Seconds for which the process has not advanced."""
        return self._stalled

    def look(self, now: float, progress: object, work: float | None) -> None:
        """Note that `progress`, any value that changes when the process advances, is so at time `now`.

        `work` grows while the process uses a CPU or reads files; None if nobody knows.
        """
        last, self._last = self._last, (now, progress, work)
        if last is None or last[1] != progress:
            self._still = self._stalled = 0.0
            return
        # If this process itself was stopped, the other one may have been as well.
        seconds = min(now - last[0], 2 * LOOK_SECONDS)
        self._stalled += seconds
        if work is not None and last[2] is not None and work - last[2] < _LEAST_SHARE * seconds:
            self._still += seconds

    def rest(self) -> None:
        """The process has nothing to do."""
        self._last, self._still, self._stalled = None, 0.0, 0.0

    def overdue(self, limit: float) -> bool:
        """Whether the process did nothing for `limit` seconds (0: no limit), or worked for `BUSY_FACTOR` times that."""
        return limit > 0 and (self._still >= limit or self._stalled >= limit * BUSY_FACTOR)


def step_limit(configured: float, longest_step: float) -> float:
    """Seconds for one step: as configured (0: no limit), or more where steps take long."""
    return max(configured, STEP_FACTOR * longest_step) if configured else 0.0
