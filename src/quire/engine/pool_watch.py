"""PoolWatch: records what changes in the KV pool, in the engine process, for as long as somebody looks.

It compares the pool with what it sent last, at most five times a second. A look at a large pool takes milliseconds, so
it measures itself and looks less often: recording takes at most `MAX_SHARE` of the engine's time, whatever the pool's
size. Without viewers there is no PoolWatch.
"""

import time
from collections.abc import Callable, Sequence

from quire.pool_view import MAX_COPIES, MAX_VIEWED_REQUESTS, PoolChange, PoolShape, RequestView
from quire.scheduler.pool_details import view_request
from quire.scheduler.scheduler import Scheduler

LOOK_SECONDS = 0.2
MAX_SHARE = 0.008


class PoolWatch:
    """One recording. The first change holds the whole pool."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.perf_counter) -> None:
        from quire.scheduler.pool_words import PoolWords  # imports numpy, which loading should not wait for

        self._scheduler = scheduler
        self._words = PoolWords(scheduler.pool)
        self._is_first = True
        self._clock = clock
        self._rows: dict[str, RequestView] = {}
        """The rows as they were sent, by request."""
        self._free_slots = list(range(MAX_VIEWED_REQUESTS, 0, -1))
        self._copies: list[tuple[int, int]] = []
        self._next_look = clock()
        self._is_behind = True
        self.seconds_spent = 0.0
        """All time that looks took."""

    def note_copies(self, copies: Sequence[tuple[int, int]]) -> None:
        """A step copies these blocks on write."""
        self._copies += copies
        del self._copies[:-MAX_COPIES]

    def note_work(self) -> None:
        """The pool may have changed."""
        self._is_behind = True

    def slot_of(self, request_id: str) -> int:
        """The number by which viewers know a request; 0 if they do not."""
        row = self._rows.get(request_id)
        return 0 if row is None else row.slot

    @property
    def seconds_to_look(self) -> float | None:
        """Seconds until the next look; None if there is nothing new to see."""
        return max(0.0, self._next_look - self._clock()) if self._is_behind else None

    def look(self) -> PoolChange | None:
        """What changed since the last look; None if nothing did, or if it is too early for a look."""
        started = self._clock()
        if not self._is_behind or started < self._next_look:
            return None
        change = self._compare()
        took = self._clock() - started
        self.seconds_spent += took
        self._next_look = started + max(LOOK_SECONDS, took / MAX_SHARE)
        self._is_behind = False
        return change

    def _compare(self) -> PoolChange | None:
        scheduler, pool = self._scheduler, self._scheduler.pool
        scheduler.update_fill()
        groups = [*scheduler.groups.values()]
        requests, ended = self._compare_requests()
        blocks, words = self._words.compare(groups, {request_id: row.slot for request_id, row in self._rows.items()})
        shape = None
        if self._is_first:
            self._is_first = False
            budget = scheduler.limits.max_num_batched_tokens
            shape = PoolShape(pool.num_blocks, pool.block_size, pool.windows, budget)
        copies, self._copies = self._copies, []
        if not (shape or blocks or requests or ended or copies):
            return None
        return PoolChange(shape, blocks, words, requests, ended, copies)

    def _compare_requests(self) -> tuple[list[RequestView], list[int]]:
        """Rows that are new or changed, and slots whose request has ended."""
        groups = self._scheduler.groups
        ended = [row.slot for request_id, row in self._rows.items() if request_id not in groups]
        self._rows = {request_id: row for request_id, row in self._rows.items() if request_id in groups}
        changed = []
        for request_id, group in groups.items():
            before = self._rows.get(request_id)
            if before is None and not self._free_slots:
                continue
            row = view_request(group, self._free_slots.pop() if before is None else before.slot)
            if row != before:
                self._rows[request_id] = row
                changed.append(row)
        # A slot that has just become free is reused by the next look, after viewers have seen it end.
        self._free_slots += ended
        return changed, ended
