"""PoolMirror: the words of all blocks as the engine last sent them, and what each viewer lacks of them.

A viewer gets the difference between the mirror and what it got last, whenever it is ready to take more. So a slow
viewer skips what happened in between, nothing is queued for it, and what it shows is always true. Imports numpy;
imported with the first viewer.
"""

from collections import deque
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.pool_view import (
    FILL_AT,
    FILL_BITS,
    FLAGS_AT,
    FLAGS_BITS,
    GROUP_AT,
    MAX_COPIES,
    OWNER_BITS,
    REFS_AT,
    REFS_BITS,
    PoolChange,
    PoolFrame,
    PoolShape,
    RequestView,
)

MAX_RUNS = 32_768
"""Runs of blocks in one frame. A frame that lacks some is followed by another."""

_FIELDS = ((0, OWNER_BITS), (REFS_AT, REFS_BITS), (FILL_AT, FILL_BITS), (FLAGS_AT, FLAGS_BITS), (GROUP_AT, 8))
"""Where each field of a word begins, and its bits."""

Words = NDArray[np.uint64]


class PoolMirror:
    """What the engine sent. `apply` is its only writer."""

    def __init__(self) -> None:
        self.shape: PoolShape | None = None
        """None before the first change of an engine."""
        self.number = 0
        """Grows with each change."""
        self.engine_number = 0
        """Grows with each engine process."""
        self.words: Words = np.zeros(0, np.uint64)
        self.rows: dict[int, RequestView] = {}
        """Unfinished requests by slot."""
        self.copies: deque[tuple[int, int]] = deque(maxlen=MAX_COPIES)
        self.num_copies = 0

    def apply(self, change: PoolChange) -> None:
        """Take over a change."""
        if change.shape is not None:
            self.shape = change.shape
            self.engine_number += 1
            self.words = np.zeros(change.shape.num_blocks, np.uint64)
            self.rows = {}
        self.words[np.frombuffer(change.blocks, np.uint32)] = np.frombuffer(change.words, np.uint64)
        for slot in change.ended:
            self.rows.pop(slot, None)
        for row in change.requests:
            self.rows[row.slot] = row
        self.copies += change.copies
        self.num_copies += len(change.copies)
        self.number += 1

    def clear(self) -> None:
        """The engine is gone, and with it all it held."""
        self.shape = None
        self.rows = {}
        self.words = np.zeros(0, np.uint64)
        self.number += 1


class MirrorReader:
    """What one viewer has got. With `tenant` it gets only that tenant's requests, and the blocks they hold first."""

    def __init__(self, mirror: PoolMirror, tenant: str | None) -> None:
        self._mirror = mirror
        self._tenant = tenant
        self._engine_number = -1
        self._number = -1
        self._words: Words = np.zeros(0, np.uint64)
        self._rows: dict[int, RequestView] = {}
        self._num_copies = mirror.num_copies

    @property
    def is_behind(self) -> bool:
        return self._number != self._mirror.number

    def catch_up(self, frame: PoolFrame) -> None:
        """Add to `frame` what the viewer lacks."""
        mirror = self._mirror
        if mirror.shape is None:
            self._number = mirror.number
            return
        if self._engine_number != mirror.engine_number:
            self._engine_number = mirror.engine_number
            self._words, self._rows = np.zeros_like(mirror.words), {}
            frame.shape = mirror.shape
        rows = mirror.rows
        words = mirror.words
        if self._tenant is not None:
            rows = {slot: row for slot, row in rows.items() if row.tenant == self._tenant}
            owners = words & np.uint64(2**OWNER_BITS - 1)
            words = np.where(np.isin(owners, np.fromiter(rows, np.uint64, len(rows))), words, np.uint64(0))
        frame.ended = [slot for slot in self._rows if slot not in rows]
        frame.requests = [row for slot, row in rows.items() if row != self._rows.get(slot)]
        self._rows = rows.copy()
        changed = np.flatnonzero(words != self._words)
        runs, num_sent = _runs(changed, words[changed])
        self._words[changed[:num_sent]] = words[changed[:num_sent]]
        frame.blocks = runs
        frame.copies = self._new_copies(words)
        if num_sent == changed.size:
            self._number = mirror.number

    def _new_copies(self, words: Words) -> list[tuple[int, int]]:
        mirror = self._mirror
        num_new = min(mirror.num_copies - self._num_copies, len(mirror.copies))
        self._num_copies = mirror.num_copies
        copies = list(islice(mirror.copies, len(mirror.copies) - num_new, None))
        if self._tenant is not None:
            copies = [(source, copy) for source, copy in copies if words[source] and words[copy]]
        return copies


def _runs(blocks: NDArray[np.int64], words: Words) -> tuple[list[tuple[int, int, int, int, int, int, int]], int]:
    """Consecutive blocks with the same word as runs (see `PoolFrame.blocks`), at most `MAX_RUNS`, and the number of
    blocks in them."""
    if not blocks.size:
        return [], 0
    starts = np.flatnonzero((np.diff(blocks, prepend=blocks[0] - 2) != 1) | (np.diff(words, prepend=~words[0]) != 0))
    ends = np.append(starts[1:], blocks.size)
    starts, ends = starts[:MAX_RUNS], ends[:MAX_RUNS]
    columns: list[NDArray[Any]] = [blocks[starts], ends - starts]
    for at, bits in (
        (0, OWNER_BITS),
        (REFS_AT, REFS_BITS),
        (FILL_AT, FILL_BITS),
        (FLAGS_AT, FLAGS_BITS),
        (GROUP_AT, 8),
    ):
        columns.append((words[starts] >> np.uint64(at)) & np.uint64(2**bits - 1))
    runs = list(zip(*(column.tolist() for column in columns), strict=True))
    return runs, int(ends[-1])
