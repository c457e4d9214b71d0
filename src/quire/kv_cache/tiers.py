"""Tiers: which blocks are stored below the pool, in host memory or on disk, and whether loading beats computing.

A tier is known here by block hashes and sizes; the bytes belong to the runner. Only the scheduler writes `TierIndex`;
the runner reports what was stored, read or lost. Each tier is bounded in bytes and evicts the least recently used
blocks.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from quire.kv_cache.block_hash import BlockHash
from quire.memory_stats import TierStats

HOST, DISK = "host", "disk"
STAGING_BYTES = 64 * 2**20
"""Memory for blocks on their way to the disk, and as much for those from it; more only for very large blocks."""
MIN_STAGED_BLOCKS = 4
MAX_EXPECTED = 1 << 16
"""Most blocks that are remembered as computed by another engine."""
_WEIGHT = 0.2
"""Weight of the newest measurement in a running mean."""
_MAX_AGE = 60.0
"""Seconds after which a measured rate counts as unknown, so that a slow spell has an end."""
_MIN_STEP_TOKENS = 32
_MIN_ROW_TOKENS = 4
"""A step measures the rate of computing prompts if it has this many tokens, and this many per sequence."""


def num_staged_blocks(block_bytes: int) -> int:
    """How many blocks may be on their way to the disk at once, and as many from it."""
    return max(MIN_STAGED_BLOCKS, STAGING_BYTES // block_bytes)


class Tier:
    """The blocks of one tier, least recently used first, and the space they take of `capacity_bytes`."""

    def __init__(
        self,
        capacity_bytes: int,
        block_bytes: int,
        stored: Iterable[tuple[bytes, int]] = (),
        *,
        state_bytes: int = 0,
        changes: Callable[[], Iterable[tuple[bytes, int]]] = tuple,
        eager: bool = False,
        fetches: bool = False,
    ) -> None:
        """`changes`: what other engines stored (hash, bytes) or removed (hash, 0) since the last call."""
        self.eager = eager
        """Blocks are stored as soon as they are full, for engines that fetch them."""
        self.fetches = fetches
        """A block that is not stored may come from another engine."""
        self._expected: dict[bytes, int] = {}
        """Blocks and states that another engine was asked to compute and their space, oldest first. They are read as if
        they were stored here, but take nothing of the capacity."""
        self.block_bytes = block_bytes
        """Space that one more block takes."""
        self.state_bytes = state_bytes
        """Space that one more recurrent state takes."""
        self.stats = TierStats(capacity_bytes=capacity_bytes)
        self._changes = changes
        self.listeners: list[Callable[[bytes, bool], None]] = []
        """Called with a block's hash, and whether it is now stored (or else gone)."""
        self._sizes: OrderedDict[bytes, int] = OrderedDict(stored)
        """Blocks of other models only take space; their keys are no block hashes."""
        self.stats.num_bytes = sum(self._sizes.values())
        self.stats.num_blocks = len(self._sizes)

    def expect(self, block_hash: bytes, *, is_state: bool = False) -> None:
        """Another engine has a block or a state."""
        self._expected[block_hash] = self.state_bytes if is_state else self.block_bytes
        if len(self._expected) > MAX_EXPECTED:
            del self._expected[next(iter(self._expected))]

    def expects(self, block_hash: bytes) -> bool:
        return block_hash in self._expected

    def forget(self, block_hash: bytes) -> None:
        """A block has come from another engine, or will not."""
        self._expected.pop(block_hash, None)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def touch(self, block_hash: bytes) -> None:
        """Note that a block was used."""
        self._sizes.move_to_end(block_hash)

    def size(self, block_hash: bytes) -> int:
        """The space of what is stored or expected; of a block if nothing is."""
        return self._sizes.get(block_hash) or self._expected.get(block_hash, self.block_bytes)

    def num_blocks(self, block_hash: bytes) -> int:
        """The same in blocks, for whose bytes rates are measured."""
        return -(-self.size(block_hash) // self.block_bytes)

    def add(self, block_hash: bytes, size: int) -> None:
        """Note that a block or a state is stored."""
        if block_hash not in self._sizes:
            self._sizes[block_hash] = size
            self.stats.num_bytes += size
            self.stats.num_blocks += 1
            for listener in self.listeners:
                listener(block_hash, True)

    def remove(self, block_hash: bytes) -> bool:
        """Note that a block is no longer stored. Returns whether it was."""
        size = self._sizes.pop(block_hash, None)
        if size is None:
            return False
        self.stats.num_bytes -= size
        self.stats.num_blocks -= 1
        for listener in self.listeners:
            listener(block_hash, False)
        return True

    def hashes(self) -> list[bytes]:
        return list(self._sizes)

    def follow(self) -> None:
        """Note what other engines changed. A block that is gone and still listed is a failed read, nothing worse."""
        for block_hash, size in self._changes():
            if size:
                self.add(block_hash, size)
            else:
                self.remove(block_hash)

    def make_room(self, reserved_bytes: int, kept: Callable[[bytes], bool]) -> list[bytes] | None:
        """Evict blocks until `reserved_bytes` more fit, but none that is `kept`. Returns the evicted ones.

        Returns None, with nothing evicted, if that is impossible. Looks at no more blocks than it evicts or skips.
        """
        missing = self.stats.num_bytes + reserved_bytes - self.stats.capacity_bytes
        victims: list[bytes] = []
        for block_hash, size in self._sizes.items():
            if missing <= 0:
                break
            if not kept(block_hash):
                victims.append(block_hash)
                missing -= size
        if missing > 0:
            return None
        for block_hash in victims:
            self.remove(block_hash)
        self.stats.total_evicted += len(victims)
        return victims


class Rate:
    """Seconds per unit of work: a running mean of measurements. Unknown at first, and when the last one is old."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mean = 0.0
        self._measured_at: float | None = None

    def measure(self, num_units: int, seconds: float) -> None:
        """Record that `num_units` took `seconds`; zero of either is ignored."""
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
    """The part of a step plan that `TierIndex.measure_step` reads."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def rows(self) -> list[int]: ...


class TierIndex:
    """The tiers, fastest first, and the measured rates that decide between loading and computing."""

    def __init__(self, clock: Callable[[], float], *, host: Tier | None = None, disk: Tier | None = None) -> None:
        self.tiers = {name: tier for name, tier in ((HOST, host), (DISK, disk)) if tier is not None}
        self._load_rates = {name: Rate(clock) for name in self.tiers}
        """Seconds per block."""
        self._compute_rate = Rate(clock)
        """Seconds per token."""

    def find(self, block_hash: BlockHash) -> str | None:
        """The first tier that holds a block."""
        for tier_name, tier in self.tiers.items():
            if block_hash in tier:
                return tier_name
        return None

    def remove(self, block_hash: BlockHash) -> list[tuple[str, BlockHash]]:
        """Remove a block from every tier. Returns (tier, hash) for each that held it."""
        return [(name, block_hash) for name, tier in self.tiers.items() if tier.remove(block_hash)]

    def measure_load(self, tier_name: str, num_blocks: int, seconds: float) -> None:
        self._load_rates[tier_name].measure(num_blocks, seconds)

    def measure_step(self, plan: StepSize, seconds: float) -> None:
        """A step took `seconds`. Steps that mostly decode do not show at what rate prompts are computed."""
        if plan.num_tokens >= max(_MIN_STEP_TOKENS, _MIN_ROW_TOKENS * len(plan.rows)):
            self._compute_rate.measure(plan.num_tokens, seconds)

    def num_worth_loading(self, stored_in: Sequence[Sequence[str]], block_size: int, num_queued_reads: int) -> int:
        """How many of consecutive logical blocks to load so that most time is saved; the rest is computed.

        `stored_in` holds the tiers of each one's blocks, one for every KV group. Reads from disk wait
        for `num_queued_reads` others. A rate of loading that was not measured lately counts as zero seconds: loading
        measures it.
        """
        token_seconds = self._compute_rate.seconds_per_unit
        if token_seconds is None:
            return len(stored_in)
        best, num_best = 0.0, 0
        saved, waits = 0.0, False
        for index, tier_names in enumerate(stored_in):
            saved += block_size * token_seconds
            for tier_name in tier_names:
                block_seconds = self._load_rates[tier_name].seconds_per_unit or 0.0
                if tier_name == DISK and not waits:
                    waits = True
                    saved -= num_queued_reads * block_seconds
                saved -= block_seconds
            if saved >= best:
                best, num_best = saved, index + 1
        return num_best
