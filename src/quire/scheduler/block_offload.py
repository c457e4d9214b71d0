"""BlockOffload: what goes down from the pool to the tiers and comes back, and which sequences wait for it.

Down. A named block that is evicted is saved before its space is written: to host memory where there is a host tier,
and to disk unless it is there. Besides, a block that nobody holds any more goes to disk as soon as there is time
(write-behind), so that a later process finds it although this one never ran out of space. What is on its way is
bounded; a block evicted beyond that is dropped and counted. The beginnings of prompts go first.

Up. A sequence to be admitted takes blocks of the pool for what the tiers hold of it. Host memory is copied at the start
of the step that also computes; reads from disk run in the background, and until the last has ended the sequence holds
memory and a row but is in no plan. A read that fails cuts its table there: the rest is computed.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import DISK, HOST, Tier, TierIndex, num_staged_blocks
from quire.outputs import TierStats
from quire.scheduler.sequence import Sequence
from quire.step import OffloadPlan, OffloadResult

WRITE_BEHIND_SHARE = 4
"""One n-th of the blocks that may be on their way is taken per step for writing behind; evictions may take all."""


@dataclass(slots=True)
class _Loading:
    """A sequence whose blocks from logical block `first` on come from below."""

    first: int
    names: list[BlockHash]
    origins: list[str]
    """The tier of each."""
    missing: set[BlockHash] = field(default_factory=set)
    """Those that no plan has put into the pool yet."""
    unread: list[BlockHash] = field(default_factory=list)
    """Those that are on disk and were not asked for yet, the first at the end."""

    def tokens_by_tier(self, block_size: int) -> dict[str, int]:
        """What is loaded when nothing is missing any more."""
        return {tier_name: count * block_size for tier_name, count in Counter(self.origins).items()}


class BlockOffload:
    """Owned by the scheduler; the pool reports evicted and idle blocks to it."""

    def __init__(self, index: TierIndex, pool: BlockPool) -> None:
        self.waiting: dict[Sequence, _Loading] = {}
        """Sequences that hold memory and wait for reads."""
        self._index = index
        self._pool = pool
        self._plan = OffloadPlan()
        self._pinned: set[BlockHash] = set()
        """What the plan in the making loads from host memory or saves there: it must not make room in it."""
        self._planned: dict[BlockHash, tuple[str, int, Sequence]] = {}
        """Loads of that plan: tier, block, for whom."""
        self._complete: dict[Sequence, _Loading] = {}
        """Sequences that have all their blocks with that plan."""
        self._coming: set[BlockHash] = set()
        """Names of all these, and of those that sequences wait for: in the pool they have them only when all are there.
        """
        self._ended: list[tuple[Sequence, dict[str, int]]] = []
        """(sequence, tokens loaded by tier) since the scheduler last asked, of sequences that had to wait."""
        self._idle: dict[BlockHash, int] = {}
        """Blocks to write behind, the last first."""
        self._saving: set[BlockHash] = set()
        self._unwanted: set[BlockHash] = set()
        """On their way to disk, but to be forgotten when they are there."""
        self._reads: dict[BlockHash, Sequence | None] = {}
        """Reads that have not ended, and who waits for each."""
        self._arrived: dict[BlockHash, Sequence | None] = {}
        """Reads that have ended since the last plan."""
        self._host, self._disk = index.tiers.get(HOST), index.tiers.get(DISK)
        self._max_staged = num_staged_blocks(self._disk.block_bytes) if self._disk is not None else 0
        pool.on_evict = self._save_evicted
        if self._disk is not None:
            pool.on_idle = self._note_idle
            # The size may be less than it was for the process that stored all this.
            self._plan.forgotten = [(DISK, name) for name in self._disk.make_room(0, lambda name: False) or ()]

    # -- up -----------------------------------------------------------------------------------------------------------

    def is_coming(self, name: BlockHash) -> bool:
        """Whether a block is on its way up to somebody."""
        return name in self._coming

    @property
    def brings_blocks(self) -> bool:
        """Whether anybody waits for a block, or the plan in the making loads one."""
        return bool(self._coming)

    def find(self, sequence: Sequence, token_ids: list[int], first: int) -> list[tuple[str, BlockHash]]:
        """(tier, name) of the blocks from logical block `first` on that tiers hold without a gap.

        The last token is never covered, as in `BlockTable.find_prefix`.
        """
        found: list[tuple[str, BlockHash]] = []
        for index in range(first, (len(token_ids) - 1) // self._pool.block_size):
            name = sequence.table.name_of(index, token_ids)
            tier_name = self._index.find(name)
            if tier_name is None or self.is_coming(name):
                break
            found.append((tier_name, name))
        return found

    def start(self, sequence: Sequence, found: list[tuple[str, BlockHash]]) -> dict[str, int]:
        """Load what of `found` is worth it, into new blocks at the end of a table whose last block is full.

        The pool must have a free block for each. Returns the tokens by tier if the plan in the making loads all of
        them; otherwise `begin` tells of the sequence when it need wait no longer.
        """
        block_size, table = self._pool.block_size, sequence.table
        num_queued = len(self._reads) + sum(len(loading.unread) for loading in self.waiting.values())
        num_worth = self._index.num_worth_loading([tier_name for tier_name, _ in found], block_size, num_queued)
        for tier_name, _ in found[num_worth:]:
            self._index.tiers[tier_name].stats.total_recomputed += 1
        sources = found[:num_worth]
        if not sources:
            return {}
        loading = _Loading(len(table.blocks), [name for _, name in sources], [tier_name for tier_name, _ in sources])
        loading.missing.update(loading.names)
        self._coming.update(loading.names)
        self._pinned.update(loading.names)
        for tier_name, name in reversed(sources):
            # The beginnings of prompts are to survive longest here, too.
            self._index.tiers[tier_name].touch(name)
        table.append(num_worth * block_size, [])
        sequence.start_from_table()
        self.waiting[sequence] = loading
        for offset, (tier_name, name) in enumerate(sources):
            block = table.blocks[loading.first + offset]
            if tier_name == HOST:
                self._load(sequence, loading, HOST, name, block)
            elif name in self._arrived:
                # Whoever had it read is gone.
                del self._arrived[name]
                self._load(sequence, loading, DISK, name, block)
            elif name in self._reads:
                self._reads[name] = sequence
            else:
                loading.unread.append(name)
        loading.unread.reverse()
        self._ask_for_reads()
        return {} if sequence in self.waiting else loading.tokens_by_tier(block_size)

    def begin(self) -> list[tuple[Sequence, dict[str, int]]]:
        """Open a plan with what has arrived. Returns (sequence, tokens by tier) of those that need wait no longer."""
        for name, sequence in self._arrived.items():
            if sequence is None:
                self._plan.dropped.append(name)
            else:
                loading = self.waiting[sequence]
                block = sequence.table.blocks[loading.first + loading.names.index(name)]
                self._load(sequence, loading, DISK, name, block)
                if sequence not in self.waiting:
                    self._ended.append((sequence, loading.tokens_by_tier(self._pool.block_size)))
        self._arrived.clear()
        self._ask_for_reads()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, sequence: Sequence) -> None:
        """A sequence gives its blocks back: nothing may be written into them any more."""
        loading = self.waiting.pop(sequence, None) or self._complete.pop(sequence, None)
        if loading is not None:
            self._coming.difference_update(loading.names)
        self._ended = [(other, loaded) for other, loaded in self._ended if other is not sequence]
        for orphans in (self._reads, self._arrived):
            for name in [name for name, owner in orphans.items() if owner is sequence]:
                orphans[name] = None
        for name in [name for name, (_, _, owner) in self._planned.items() if owner is sequence]:
            if self._planned.pop(name)[0] == DISK:
                self._arrived[name] = None

    def _load(self, sequence: Sequence, loading: _Loading, tier_name: str, name: BlockHash, block: int) -> None:
        self._planned[name] = (tier_name, block, sequence)
        loading.missing.remove(name)
        stats, size = self._index.tiers[tier_name].stats, self._pool.block_size
        stats.total_loaded += 1
        stats.total_loaded_bytes += self._index.tiers[tier_name].block_bytes
        stats.total_hits += size
        if not loading.missing:
            del self.waiting[sequence]
            self._complete[sequence] = loading

    def _ask_for_reads(self) -> None:
        """Begin as many reads as may be on their way, in the order in which sequences came."""
        num_free = self._max_staged - len(self._reads) - len(self._arrived)
        for sequence, loading in self.waiting.items():
            while loading.unread and num_free > 0:
                name = loading.unread.pop()
                self._reads[name] = sequence
                self._plan.reads.append(name)
                num_free -= 1

    def _cut(self, sequence: Sequence, failed: BlockHash) -> None:
        """A block could not be read: what the sequence has before it stays, the rest is computed."""
        loading = self.waiting[sequence]
        end = loading.names.index(failed)
        lost = set(loading.names[end:])
        del loading.names[end:], loading.origins[end:]
        loading.missing -= lost
        self._coming -= lost
        loading.unread = [name for name in loading.unread if name not in lost]
        for orphans in (self._reads, self._arrived):
            for name in lost & orphans.keys():
                orphans[name] = None
        table = sequence.table
        table.truncate((loading.first + end) * self._pool.block_size)
        sequence.start_from_table()
        if not loading.missing:
            del self.waiting[sequence]
            table.hash_full_blocks(sequence.token_ids, table.num_tokens)
            self._coming.difference_update(loading.names)
            self._ended.append((sequence, loading.tokens_by_tier(self._pool.block_size)))

    # -- down ---------------------------------------------------------------------------------------------------------

    def _save_evicted(self, block: int, name: BlockHash) -> None:
        self._idle.pop(name, None)
        host, disk = self._host, self._disk
        if host is not None:
            if name in host:
                host.touch(name)
            elif (room := host.make_room(host.block_bytes, self._pinned.__contains__)) is None:
                host.stats.total_dropped += 1
            else:
                self._plan.forgotten += [(HOST, other) for other in room]
                self._plan.saves.append((HOST, name, block))
                self._pinned.add(name)
                host.add(name)
                host.stats.total_saved += 1
                host.stats.total_saved_bytes += host.block_bytes
        if disk is not None and not disk.stats.stopped and name not in disk and name not in self._saving:
            self._save_to_disk(disk, name, block)

    def _note_idle(self, block: int, name: BlockHash) -> None:
        disk = self._disk
        assert disk is not None, "only a disk tier is written behind"
        if name in disk:
            disk.touch(name)
        elif not disk.stats.stopped and name not in self._saving:
            self._idle.pop(name, None)
            self._idle[name] = block

    def _save_to_disk(self, disk: Tier, name: BlockHash, block: int) -> None:
        room = None
        if len(self._saving) < self._max_staged:
            reserved = (len(self._saving) + 1) * disk.block_bytes
            room = disk.make_room(reserved, lambda other: other in self._reads or other in self._pinned)
        if room is None:
            disk.stats.total_dropped += 1
            return
        self._plan.forgotten += [(DISK, other) for other in room]
        self._plan.saves.append((DISK, name, block))
        self._saving.add(name)

    def _write_behind(self, disk: Tier) -> None:
        quota = min(self._max_staged - len(self._saving), max(1, self._max_staged // WRITE_BEHIND_SHARE))
        while self._idle and quota > 0:
            name, block = self._idle.popitem()
            if self._pool.names[block] == name and name not in disk and name not in self._saving:
                self._save_to_disk(disk, name, block)
                quota -= 1

    # -- a step -------------------------------------------------------------------------------------------------------

    @property
    def has_idle_work(self) -> bool:
        """Whether there are blocks to write behind, or some whose writing has not ended."""
        return bool(self._idle) or bool(self._saving)

    def finish(self, *, computes: bool) -> OffloadPlan | None:
        """Close the plan, of a step that `computes` something or not. None if there is nothing to do or to wait for."""
        if self._disk is not None and self._idle:
            self._write_behind(self._disk)
        plan, self._plan = self._plan, OffloadPlan()
        plan.loads = [(tier_name, name, block) for name, (tier_name, block, _) in self._planned.items()]
        plan.wait = not computes and bool(self._reads)
        self._pinned.clear()
        if self._reads or self._saving or plan != OffloadPlan():
            return plan
        return None

    def take_in(self, moves: OffloadPlan | None, moved: OffloadResult) -> None:
        """The plan was executed; note what has ended meanwhile."""
        for sequence, loading in self._complete.items():
            end = (loading.first + len(loading.names)) * self._pool.block_size
            sequence.table.hash_full_blocks(sequence.token_ids, end)
            self._coming.difference_update(loading.names)
        self._complete.clear()
        self._planned.clear()
        if self._host is not None and moves is not None:
            num_loads = sum(tier_name == HOST for tier_name, _, _ in moves.loads)
            self._index.measure_load(HOST, num_loads, moved.load_seconds)
        disk = self._disk
        if disk is None:
            return
        for name in moved.saved:
            self._saving.discard(name)
            disk.add(name)
            disk.stats.total_saved += 1
            disk.stats.total_saved_bytes += disk.block_bytes
            if name in self._unwanted:
                self._unwanted.discard(name)
                self._forget(name)
        for name in moved.not_saved:
            self._saving.discard(name)
            self._unwanted.discard(name)
            disk.stats.total_dropped += 1
        for name, seconds in moved.read:
            self._arrived[name] = self._reads.pop(name)
            self._index.measure_load(DISK, 1, seconds)
        for name, reason in moved.not_read:
            disk.remove(name)
            disk.stats.total_corrupt += reason == "corrupt"
            sequence_or_none = self._reads.pop(name)
            if sequence_or_none is not None:
                self._cut(sequence_or_none, name)
        if moved.stopped:
            disk.stats.stopped = True
            self._idle.clear()

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def forget(self, sequence: Sequence) -> None:
        """What a sequence holds is not to be trusted: neither is what was saved of it."""
        for index in range(sequence.table.num_tokens // self._pool.block_size):
            self._forget(sequence.table.name_of(index, sequence.token_ids))

    def forget_all(self) -> None:
        """Empty the tiers."""
        for tier in self._index.tiers.values():
            for name in tier.names():
                self._forget(name)
        for name in (*self._idle, *self._saving):
            self._forget(name)

    def _forget(self, name: BlockHash) -> None:
        self._plan.forgotten += self._index.remove(name)
        self._idle.pop(name, None)
        if name in self._saving:
            self._unwanted.add(name)

    def stats(self) -> dict[str, TierStats]:
        return {name: replace(tier.stats) for name, tier in self._index.tiers.items()}
