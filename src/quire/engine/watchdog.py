"""Watchdog: measures for how long a process that has work does not advance. It decides nothing and ends nothing."""

from quire.engine.memory_plan import MemoryPlan

LOOK_SECONDS = 0.25
"""Time between two looks."""
STEP_FACTOR = 20.0
"""A step may take this much longer than the longest one lately."""
OPERATIONS_PER_SECOND = {"cpu": 1e10, "cuda": 1e12}
"""What the slowest machine computes."""
_LEAST_SHARE = 0.01
"""A process that gets less of a CPU does nothing."""
_UNKNOWN_SHARE = 0.1
"""What a process is taken to get of a CPU if nobody knows."""


class Watchdog:
    """One process, looked at every `LOOK_SECONDS` while it has work."""

    def __init__(self) -> None:
        self._last: tuple[float, object, float | None] | None = None
        """Time, sign of progress and work done at the last look."""
        self._still = self._worked = self._stalled = 0.0

    @property
    def stalled(self) -> float:
        """Seconds for which the process has not advanced."""
        return self._stalled

    def look(self, now: float, progress: object, work: float | None) -> None:
        """Note that `progress`, any value that changes when the process advances, is so at time `now`.

        `work` grows by one a second or more while the process has a CPU or reads files; None if nobody knows.
        """
        last, self._last = self._last, (now, progress, work)
        if last is None or last[1] != progress:
            self._still = self._worked = self._stalled = 0.0
            return
        # If this process itself was stopped, the other one may have been as well.
        seconds = min(now - last[0], 2 * LOOK_SECONDS)
        self._stalled += seconds
        worked = _UNKNOWN_SHARE * seconds if work is None or last[2] is None else min(seconds, work - last[2])
        if worked < _LEAST_SHARE * seconds:
            self._still += seconds
        else:
            self._worked += worked  # neighbours that hold the CPUs do not make a process late

    def rest(self) -> None:
        """The process has nothing to do."""
        self._last, self._still, self._worked, self._stalled = None, 0.0, 0.0, 0.0

    def overdue(self, limit: float, allowance: float = 0.0) -> bool:
        """Whether the process did nothing for `limit` seconds (0: no limit), or worked for `limit + allowance` seconds
        of its own time."""
        return limit > 0 and (self._still >= limit or self._still + self._worked >= limit + allowance)


def step_limit(configured: float, longest_step: float) -> float:
    """Seconds for one step: as configured (0: no limit), or more where steps take long."""
    return max(configured, STEP_FACTOR * longest_step) if configured else 0.0


def step_allowance(plan: MemoryPlan) -> float:
    """Seconds that the largest step may work beyond its limit: what the model and an image take on a slow machine. No
    step may have been measured yet."""
    operations = 2.0 * plan.weights * plan.max_num_batched_tokens + plan.images.operations
    return operations / OPERATIONS_PER_SECOND[plan.device]
