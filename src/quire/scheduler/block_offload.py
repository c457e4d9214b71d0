"""BlockOffload: which blocks go from the pool to the tiers below it, which come back, and who waits for them.

Storing. An evicted block is stored before its space is written: in host memory if there is a host tier, and on disk
unless the disk has it. A block that nobody holds any more also goes to disk as soon as there is time (write-behind), so
that a later process finds it even if this one never ran out of space. The number of blocks on their way is bounded; a
block evicted beyond that is lost and counted. The beginnings of prompts are stored first.

Loading. When a sequence is admitted, it takes blocks of the pool for what the tiers hold of it. Copies from host memory
are part of the step that also computes. Reads from disk run in the background; until the last one has finished, the
sequence holds memory and a row but is in no plan. If a read fails, the sequence's table is cut there and the rest is
computed.
"""

from dataclasses import replace

from quire.kv_cache.block_hash import BlockHash, group_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import HOLE, GroupBlocks
from quire.kv_cache.prefix_search import Source, longest_prefix
from quire.kv_cache.tiers import DISK, HOST, Tier, TierIndex, num_staged_blocks
from quire.memory_stats import TierStats
from quire.scheduler.sequence import Sequence
from quire.scheduler.stored_prefix import DEVICE, Loading, StoredPrefix
from quire.step import OffloadPlan, OffloadResult

WRITE_BEHIND_SHARE = 4
"""Write-behind takes one n-th of the blocks that may be on their way per step; evictions may take all."""


class BlockOffload:
    """Owned by the scheduler. The pool reports evicted and idle blocks to it."""

    def __init__(self, index: TierIndex, pool: BlockPool) -> None:
        self.waiting: dict[Sequence, Loading] = {}
        """Sequences that hold memory and wait for reads."""
        self._index = index
        self._pool = pool
        self._plan = OffloadPlan()
        """The plan that is being made."""
        self._pinned: set[BlockHash] = set()
        """Blocks that this plan loads from host memory or stores there; it must not evict them."""
        self._loads: dict[BlockHash, tuple[str, int, Sequence]] = {}
        """Loads of this plan: tier, block, and the sequence that takes it."""
        self._loaded: dict[Sequence, Loading] = {}
        """Sequences whose last load is in this plan."""
        self._in_flight: set[BlockHash] = set()
        """Blocks of all these sequences. They get their hash in the pool when all blocks of the sequence are loaded."""
        self._ready: list[tuple[Sequence, dict[str, int]]] = []
        """(sequence, tokens by origin): sequences that stopped waiting since the last `begin`."""
        self._idle: dict[BlockHash, int] = {}
        """Blocks to write behind; the last one is written first."""
        self._storing: set[BlockHash] = set()
        """Blocks on their way to disk."""
        self._unwanted: set[BlockHash] = set()
        """Blocks on their way to disk that are evicted as soon as they are there."""
        self._reads: dict[BlockHash, Sequence | None] = {}
        """Unfinished reads, and the sequence that waits for each."""
        self._finished_reads: dict[BlockHash, Sequence | None] = {}
        """Reads that finished since the last plan."""
        self._host, self._disk = index.tiers.get(HOST), index.tiers.get(DISK)
        self._max_staged = num_staged_blocks(self._disk.block_bytes) if self._disk is not None else 0
        pool.eviction_listeners.append(self._store_evicted)
        if self._disk is not None:
            pool.idle_listeners.append(self._note_idle)
            # The disk tier may be smaller than it was for the process that stored its blocks.
            self._plan.evicted = [(DISK, each) for each in self._disk.make_room(0, lambda each: False) or ()]

    # -- loading ------------------------------------------------------------------------------------------------------

    def is_in_flight(self, block_hash: BlockHash) -> bool:
        """Whether a KV group's block of these tokens is on its way up to a sequence."""
        return any(group_hash(block_hash, group) in self._in_flight for group in range(self._pool.num_groups))

    @property
    def has_loads(self) -> bool:
        """Whether a sequence waits for a block, or the next plan loads one."""
        return bool(self._in_flight)

    def find(self, sequence: Sequence, token_ids: list[int], found: GroupBlocks) -> StoredPrefix:
        """The longest hit with blocks of tiers that is worth loading, after what the pool alone has: `found`.

        The last token is never covered, as in `BlockTable.find_prefix`. The pool has a free block for each to load.
        """
        pool, table, first = self._pool, sequence.table, len(found[0])

        def source(group: int, index: int) -> Source | None:
            if index < first and found[group][index] != HOLE:
                return found[group][index]
            block_hash = group_hash(table.block_hash(index, token_ids), group)
            block = pool.find(block_hash)
            if block is not None:
                return block
            tier_name = self._index.find(block_hash)
            return None if tier_name is None or block_hash in self._in_flight else (tier_name, block_hash)

        sources = longest_prefix(pool, (len(token_ids) - 1) // pool.block_size, source)
        worth = longest = StoredPrefix(first, sources, [])
        if longest:
            num_blocks = first + self._num_worth_loading(longest, found)
            if num_blocks < longest.num_blocks:
                sources = longest_prefix(pool, num_blocks, source)
                worth = StoredPrefix(first, sources, [])
        return replace(worth, not_worth=[tier_name for tier_name, _ in longest.stored[len(worth.stored) :]])

    def _num_worth_loading(self, longest: StoredPrefix, found: GroupBlocks) -> int:
        """How many logical blocks beside those in `found` to take, by the measured rates and by the free blocks."""
        pool = self._pool
        num_taken = sum(pool.ref_counts[block] == 0 for blocks in found for block in blocks if block != HOLE)
        limit = longest.first + (pool.num_free - num_taken) // pool.num_groups
        rows = zip(*(sources[longest.first : limit] for sources in longest.sources), strict=True)
        stored_in = [[source[0] for source in row if isinstance(source, tuple)] for row in rows]
        num_queued = len(self._reads) + sum(len(loading.unread) for loading in self.waiting.values())
        return self._index.num_worth_loading(stored_in, pool.block_size, num_queued)

    def start(self, sequence: Sequence, stored: StoredPrefix) -> dict[str, int]:
        """Load what `find` found, into new blocks at the end of a table whose last block is full.

        Returns the tokens by origin if the next plan loads all of them. If not, `begin` returns the sequence when it
        stops waiting.
        """
        for tier_name in stored.not_worth:
            self._index.tiers[tier_name].stats.total_recomputed += 1
        if not stored:
            return {}
        for tier_name, block_hash in reversed(stored.stored):
            # Here too, the beginnings of prompts should survive longest. Blocks that are taken must not evict these.
            self._index.tiers[tier_name].touch(block_hash)
            self._in_flight.add(block_hash)
            self._pinned.add(block_hash)
        loaded = sequence.table.adopt_stored(stored.sources, stored.first)
        sequence.start_from_table()
        blocks = {block_hash: (tier, index, block) for (tier, block_hash), index, block in loaded}
        loading = Loading(stored.first, stored.num_blocks, blocks, unplanned=set(blocks))
        if not blocks:  # what the pool alone had was missing in one group, and this hit does not need it
            return loading.tokens_by_origin(self._pool.block_size)
        self.waiting[sequence] = loading
        for block_hash, (tier_name, _, block) in blocks.items():
            if tier_name == HOST:
                self._load(sequence, loading, HOST, block_hash, block)
            elif block_hash in self._finished_reads:
                # The sequence that it was read for is gone.
                del self._finished_reads[block_hash]
                self._load(sequence, loading, DISK, block_hash, block)
            elif block_hash in self._reads:
                self._reads[block_hash] = sequence
            else:
                loading.unread.append(block_hash)
        loading.unread.reverse()
        self._plan_reads()
        return {} if sequence in self.waiting else loading.tokens_by_origin(self._pool.block_size)

    def begin(self) -> list[tuple[Sequence, dict[str, int]]]:
        """Begin a plan with the finished reads. Returns (sequence, tokens by origin) of sequences that stop waiting."""
        for block_hash, sequence in self._finished_reads.items():
            if sequence is None:
                self._plan.cancelled.append(block_hash)
            else:
                loading = self.waiting[sequence]
                self._load(sequence, loading, DISK, block_hash, loading.blocks[block_hash][2])
                if sequence not in self.waiting:
                    self._ready.append((sequence, loading.tokens_by_origin(self._pool.block_size)))
        self._finished_reads.clear()
        self._plan_reads()
        ready, self._ready = self._ready, []
        return ready

    def cancel(self, sequence: Sequence) -> None:
        """A sequence gives its blocks back: nothing may be written into them any more."""
        loading = self.waiting.pop(sequence, None) or self._loaded.pop(sequence, None)
        if loading is not None:
            self._in_flight.difference_update(loading.blocks)
        self._ready = [(other, tokens) for other, tokens in self._ready if other is not sequence]
        for reads in (self._reads, self._finished_reads):
            for block_hash in [block_hash for block_hash, owner in reads.items() if owner is sequence]:
                reads[block_hash] = None
        for block_hash in [block_hash for block_hash, (_, _, owner) in self._loads.items() if owner is sequence]:
            if self._loads.pop(block_hash)[0] == DISK:
                self._finished_reads[block_hash] = None

    def _load(self, sequence: Sequence, loading: Loading, tier_name: str, block_hash: BlockHash, block: int) -> None:
        """Add a load to the plan; with its last load a sequence stops waiting."""
        self._loads[block_hash] = (tier_name, block, sequence)
        loading.unplanned.remove(block_hash)
        stats = self._index.tiers[tier_name].stats
        stats.total_loaded += 1
        stats.total_loaded_bytes += self._index.tiers[tier_name].block_bytes
        if not loading.unplanned:
            del self.waiting[sequence]
            self._loaded[sequence] = loading
            self._count_hits(loading)

    def _count_hits(self, loading: Loading) -> None:
        """All loads of a sequence are planned."""
        for origin, num_tokens in loading.tokens_by_origin(self._pool.block_size).items():
            if origin != DEVICE:
                self._index.tiers[origin].stats.total_hits += num_tokens

    def _plan_reads(self) -> None:
        """Start as many reads as may be on their way, in the order in which the sequences came."""
        num_free = self._max_staged - len(self._reads) - len(self._finished_reads)
        for sequence, loading in self.waiting.items():
            while loading.unread and num_free > 0:
                block_hash = loading.unread.pop()
                self._reads[block_hash] = sequence
                self._plan.reads.append(block_hash)
                num_free -= 1

    def _cut(self, sequence: Sequence, failed: BlockHash) -> None:
        """A read failed: the sequence keeps what it can go on from before that block, and the rest is computed."""
        loading, table, size = self.waiting[sequence], sequence.table, self._pool.block_size
        ends = range(loading.blocks[failed][1], loading.first, -1)
        end = next((end for end in ends if table.serves(end * size)), loading.first)
        lost = loading.cut(end)
        self._in_flight -= lost
        for reads in (self._reads, self._finished_reads):
            for block_hash in lost & reads.keys():
                reads[block_hash] = None
        table.truncate(end * size)
        sequence.start_from_table()
        if not loading.unplanned:
            del self.waiting[sequence]
            table.hash_full_blocks(sequence.token_ids, table.num_tokens)
            self._in_flight.difference_update(loading.blocks)
            self._count_hits(loading)
            self._ready.append((sequence, loading.tokens_by_origin(size)))

    # -- storing ------------------------------------------------------------------------------------------------------

    def _store_evicted(self, block: int, block_hash: BlockHash) -> None:
        self._idle.pop(block_hash, None)
        host, disk = self._host, self._disk
        if host is not None:
            if block_hash in host:
                host.touch(block_hash)
            elif (room := host.make_room(host.block_bytes, self._pinned.__contains__)) is None:
                host.stats.total_dropped += 1
            else:
                self._plan.evicted += [(HOST, other) for other in room]
                self._plan.stores.append((HOST, block_hash, block))
                self._pinned.add(block_hash)
                host.add(block_hash)
                host.stats.total_saved += 1
                host.stats.total_saved_bytes += host.block_bytes
        if disk is not None and not disk.stats.stopped and block_hash not in disk and block_hash not in self._storing:
            self._store_on_disk(disk, block_hash, block)

    def _note_idle(self, block: int, block_hash: BlockHash) -> None:
        disk = self._disk
        assert disk is not None, "only a disk tier is written behind"
        if block_hash in disk:
            disk.touch(block_hash)
        elif not disk.stats.stopped and block_hash not in self._storing:
            self._idle.pop(block_hash, None)
            self._idle[block_hash] = block

    def _store_on_disk(self, disk: Tier, block_hash: BlockHash, block: int) -> None:
        room = None
        if len(self._storing) < self._max_staged:
            reserved = (len(self._storing) + 1) * disk.block_bytes
            room = disk.make_room(reserved, lambda other: other in self._reads or other in self._pinned)
        if room is None:
            disk.stats.total_dropped += 1
            return
        self._plan.evicted += [(DISK, other) for other in room]
        self._plan.stores.append((DISK, block_hash, block))
        self._storing.add(block_hash)

    def _write_behind(self, disk: Tier) -> None:
        quota = min(self._max_staged - len(self._storing), max(1, self._max_staged // WRITE_BEHIND_SHARE))
        while self._idle and quota > 0:
            block_hash, block = self._idle.popitem()
            if self._pool.hashes[block] == block_hash and block_hash not in disk and block_hash not in self._storing:
                self._store_on_disk(disk, block_hash, block)
                quota -= 1

    # -- a step -------------------------------------------------------------------------------------------------------

    @property
    def has_idle_work(self) -> bool:
        """Whether there are blocks to write behind, or blocks on their way to disk."""
        return bool(self._idle) or bool(self._storing)

    def finish(self, *, computes: bool) -> OffloadPlan | None:
        """Close the plan of a step, which may compute nothing. None if there is nothing to do or to wait for."""
        if self._disk is not None and self._idle:
            self._write_behind(self._disk)
        plan, self._plan = self._plan, OffloadPlan()
        plan.loads = [(tier_name, block_hash, block) for block_hash, (tier_name, block, _) in self._loads.items()]
        plan.wait = not computes and bool(self._reads)
        self._pinned.clear()
        if self._reads or self._storing or plan != OffloadPlan():
            return plan
        return None

    def update(self, plan: OffloadPlan | None, result: OffloadResult) -> None:
        """The plan was executed; note what finished meanwhile."""
        for sequence, loading in self._loaded.items():
            sequence.table.hash_full_blocks(sequence.token_ids, loading.end * self._pool.block_size)
            self._in_flight.difference_update(loading.blocks)
        self._loaded.clear()
        self._loads.clear()
        if self._host is not None and plan is not None:
            num_loads = sum(tier_name == HOST for tier_name, _, _ in plan.loads)
            self._index.measure_load(HOST, num_loads, result.load_seconds)
        disk = self._disk
        if disk is None:
            return
        for block_hash in result.stored:
            self._storing.discard(block_hash)
            disk.add(block_hash)
            disk.stats.total_saved += 1
            disk.stats.total_saved_bytes += disk.block_bytes
            if block_hash in self._unwanted:
                self._unwanted.discard(block_hash)
                self._evict(block_hash)
        for block_hash in result.failed_stores:
            self._storing.discard(block_hash)
            self._unwanted.discard(block_hash)
            disk.stats.total_dropped += 1
        for block_hash, seconds in result.read:
            self._finished_reads[block_hash] = self._reads.pop(block_hash)
            self._index.measure_load(DISK, 1, seconds)
        for block_hash, reason in result.failed_reads:
            disk.remove(block_hash)
            disk.stats.total_corrupt += reason == "corrupt"
            sequence_or_none = self._reads.pop(block_hash)
            if sequence_or_none is not None:
                self._cut(sequence_or_none, block_hash)
        if result.stopped:
            disk.stats.stopped = True
            self._idle.clear()

    # -- evicting -----------------------------------------------------------------------------------------------------

    def evict(self, sequence: Sequence) -> None:
        """Remove a sequence's blocks from all tiers, because their content may be wrong."""
        for index in range(sequence.table.num_tokens // self._pool.block_size):
            for group in range(self._pool.num_groups):
                self._evict(group_hash(sequence.table.block_hash(index, sequence.token_ids), group))

    def evict_all(self) -> None:
        """Empty the tiers."""
        for tier in self._index.tiers.values():
            for block_hash in tier.hashes():
                self._evict(block_hash)
        for block_hash in (*self._idle, *self._storing):
            self._evict(block_hash)

    def _evict(self, block_hash: BlockHash) -> None:
        self._plan.evicted += self._index.remove(block_hash)
        self._idle.pop(block_hash, None)
        if block_hash in self._storing:
            self._unwanted.add(block_hash)

    def stats(self) -> dict[str, TierStats]:
        return {tier_name: replace(tier.stats) for tier_name, tier in self._index.tiers.items()}
