"""Tiers: which blocks lie below the pool, in host memory or on disk, and whether loading them beats computing them.

A tier is known here by names and sizes alone; the bytes belong to the runner. `TierIndex` is written by the scheduler
only, which hears from the runner what was saved, read or lost. Each tier is bounded in bytes and forgets what was used
least recently.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from quire.kv_cache.block_hash import BlockHash
from quire.outputs import TierStats

HOST, DISK = "host", "disk"
STAGING_BYTES = 64 * 2**20
"""Memory for blocks on their way to the disk, and as much for those from it; more only for very large blocks."""
MIN_STAGED_BLOCKS = 4
_WEIGHT = 0.2
"""Of the newest measurement in a running mean."""
_MAX_AGE = 60.0
"""Seconds after which a rate that was not measured again counts as unknown, so that a slow spell is not for ever."""
_MIN_STEP_TOKENS = 32
_MIN_ROW_TOKENS = 4
"""A step tells the rate of computing prompts if it has this many tokens, and this many per sequence."""


def num_staged_blocks(block_bytes: int) -> int:
    """How many blocks may be on their way to the disk at once, and as many from it."""
    return max(MIN_STAGED_BLOCKS, STAGING_BYTES // block_bytes)


class Tier:
    """The names one tier holds, least recently used first, and what they take of `capacity_bytes`."""

    def __init__(self, capacity_bytes: int, block_bytes: int, stored: Iterable[tuple[bytes, int]] = ()) -> None:
        self.block_bytes = block_bytes
        """What one more block takes."""
        self.stats = TierStats(capacity_bytes=capacity_bytes)
        self._sizes: OrderedDict[bytes, int] = OrderedDict(stored)
        """Also of what only takes room: blocks of other models, under keys that are no names."""
        self.stats.num_bytes = sum(self._sizes.values())
        self.stats.num_blocks = len(self._sizes)

    def __contains__(self, name: bytes) -> bool:
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def touch(self, name: bytes) -> None:
        """Note that a block was used."""
        self._sizes.move_to_end(name)

    def add(self, name: bytes) -> None:
        """Note that a block is stored."""
        if name not in self._sizes:
            self._sizes[name] = self.block_bytes
            self.stats.num_bytes += self.block_bytes
            self.stats.num_blocks += 1

    def remove(self, name: bytes) -> bool:
        """Note that a block is not stored any more; whether it was."""
        size = self._sizes.pop(name, None)
        if size is None:
            return False
        self.stats.num_bytes -= size
        self.stats.num_blocks -= 1
        return True

    def names(self) -> list[bytes]:
        return list(self._sizes)

    def make_room(self, reserved_bytes: int, kept: Callable[[bytes], bool]) -> list[bytes] | None:
        """Forget blocks, but none that is `kept`, until `reserved_bytes` more fit. None, and nothing forgotten, if not.

        Looks at no more blocks than it forgets and finds kept.
        """
        missing = self.stats.num_bytes + reserved_bytes - self.stats.capacity_bytes
        victims: list[bytes] = []
        for name, size in self._sizes.items():
            if missing <= 0:
                break
            if not kept(name):
                victims.append(name)
                missing -= size
        if missing > 0:
            return None
        for name in victims:
            self.remove(name)
        self.stats.total_evicted += len(victims)
        return victims


class Rate:
    """Seconds per unit of work: a running mean of what was measured, unknown at first and when it is old."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mean = 0.0
        self._measured_at: float | None = None

    def measure(self, num_units: int, seconds: float) -> None:
        """Take note that `num_units` took `seconds`; without either it says nothing."""
        if num_units <= 0 or seconds <= 0:
            return
        value = seconds / num_units
        self._mean = value if self.seconds_per_unit is None else self._mean + _WEIGHT * (value - self._mean)
        self._measured_at = self._clock()

    @property
    def seconds_per_unit(self) -> float | None:
        if self._measured_at is None or self._clock() - self._measured_at > _MAX_AGE:
            return None
        return self._mean


class StepSize(Protocol):
    """What `TierIndex.measure_step` reads of a plan."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def rows(self) -> list[int]: ...


class TierIndex:
    """The tiers in the order in which they are asked, and the rates that decide between loading and computing."""

    def __init__(self, clock: Callable[[], float], *, host: Tier | None = None, disk: Tier | None = None) -> None:
        self.tiers = {name: tier for name, tier in ((HOST, host), (DISK, disk)) if tier is not None}
        self._load_rates = {name: Rate(clock) for name in self.tiers}
        """Seconds per block."""
        self._compute_rate = Rate(clock)
        """Seconds per token."""

    def find(self, name: BlockHash) -> str | None:
        """The first tier that holds a block."""
        for tier_name, tier in self.tiers.items():
            if name in tier:
                return tier_name
        return None

    def remove(self, name: BlockHash) -> list[tuple[str, BlockHash]]:
        """Forget a block everywhere; returns where it was."""
        return [(tier_name, name) for tier_name, tier in self.tiers.items() if tier.remove(name)]

    def measure_load(self, tier_name: str, num_blocks: int, seconds: float) -> None:
        self._load_rates[tier_name].measure(num_blocks, seconds)

    def measure_step(self, plan: StepSize, seconds: float) -> None:
        """A step took `seconds`. Steps of mostly decoding say nothing of the rate at which prompts are computed."""
        if plan.num_tokens >= max(_MIN_STEP_TOKENS, _MIN_ROW_TOKENS * len(plan.rows)):
            self._compute_rate.measure(plan.num_tokens, seconds)

    def num_worth_loading(self, stored_in: Sequence[str], block_size: int, num_queued_reads: int) -> int:
        """How many of consecutive stored blocks to load, the rest being computed: what saves most time.

        `stored_in` names each block's tier. Reads from disk wait for `num_queued_reads` others. What was not measured
        lately is taken for free on the side of loading: the way to measure it is to do it.
        """
        token_seconds = self._compute_rate.seconds_per_unit
        if token_seconds is None:
            return len(stored_in)
        best, num_best = 0.0, 0
        saved, waits = 0.0, False
        for index, tier_name in enumerate(stored_in):
            block_seconds = self._load_rates[tier_name].seconds_per_unit or 0.0
            if tier_name == DISK and not waits:
                waits = True
                saved -= num_queued_reads * block_seconds
            saved += block_size * token_seconds - block_seconds
            if saved >= best:
                best, num_best = saved, index + 1
        return num_best
