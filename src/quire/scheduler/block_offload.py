"""BlockOffload: which blocks come back from the tiers below the pool, and who waits for them.

What leaves the pool is decided in `block_storing`. When a sequence is admitted, it takes blocks of the pool for what
the tiers hold of it. Copies from host memory are part of the step that also computes. Reads from disk run in the
background; until the last one has finished, the sequence holds memory and a row but is in no plan. If a read fails, the
sequence's table is cut there and the rest is computed.

Recurrent states go the same ways, if they follow full blocks: their indices come after the pool's blocks. A sequence
that loads one cannot be cut, so if one of its reads fails, its request is preempted and looks again.
"""

from dataclasses import replace

from quire.kv_cache.block_hash import BlockHash, group_hash, state_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import HOLE, GroupBlocks
from quire.kv_cache.prefix_search import Source, Stored, longest_prefix
from quire.kv_cache.states import StatePool
from quire.kv_cache.tiers import DISK, HOST, TierIndex, num_staged_blocks
from quire.memory_stats import TierStats
from quire.scheduler.block_storing import BlockStoring
from quire.scheduler.sequence import Sequence
from quire.scheduler.stored_prefix import DEVICE, Loading, StoredPrefix
from quire.step import OffloadPlan, OffloadResult


class BlockOffload:
    """Owned by the scheduler. The pool reports evicted and idle blocks to it."""

    def __init__(self, index: TierIndex, pool: BlockPool, states: StatePool | None = None) -> None:
        self.waiting: dict[Sequence, Loading] = {}
        """Sequences that hold memory and wait for reads."""
        self._index = index
        self._pool = pool
        self._loads: dict[BlockHash, tuple[str, int, Sequence]] = {}
        """Loads of this plan: tier, block, and the sequence that takes it."""
        self._loaded: dict[Sequence, Loading] = {}
        """Sequences whose last load is in this plan."""
        self._in_flight: set[BlockHash] = set()
        """Blocks of all these sequences. They get their hash in the pool when all blocks of the sequence are loaded."""
        self._ready: list[tuple[Sequence, dict[str, int]]] = []
        """(sequence, tokens by origin): sequences that stopped waiting since the last `begin`."""
        self._reads: dict[BlockHash, Sequence | None] = {}
        """Unfinished reads, and the sequence that waits for each."""
        self._finished_reads: dict[BlockHash, Sequence | None] = {}
        """Reads that finished since the last plan."""
        self._host, self._disk = index.tiers.get(HOST), index.tiers.get(DISK)
        self._max_staged = 0 if self._disk is None else num_staged_blocks(self._disk.block_bytes)
        """Blocks that may be on their way from disk. A larger state comes alone."""
        self._has_states = states is not None
        self.failed: list[Sequence] = []
        """Sequences with a recurrent state one of whose reads failed."""
        self._storing = BlockStoring(index, pool, states, self._reads.__contains__)

    # -- loading ------------------------------------------------------------------------------------------------------

    def is_in_flight(self, block_hash: BlockHash) -> bool:
        """Whether a KV group's block of these tokens, or the state after them, is on its way up to a sequence."""
        return state_hash(block_hash) in self._in_flight or any(
            group_hash(block_hash, group) in self._in_flight for group in range(self._pool.num_groups)
        )

    def is_loading(self, sequence: Sequence) -> bool:
        """Whether a sequence still gets blocks or a state from a tier."""
        return sequence in self.waiting or sequence in self._loaded

    @property
    def has_loads(self) -> bool:
        """Whether a sequence waits for a block, or the next plan loads one."""
        return bool(self._in_flight)

    def find(self, sequence: Sequence, token_ids: list[int], found: GroupBlocks) -> StoredPrefix:
        """The longest hit with blocks of tiers that is worth loading, after what the pool alone has: `found`.

        The last token is never covered, as in `BlockTable.find_prefix`. The pool has a free block for each to load.
        What another engine was asked to compute is always worth it: this one shall have its time for other requests.
        """
        worth = longest = self.find_longest(sequence, token_ids, found, (len(token_ids) - 1) // self._pool.block_size)
        if longest:
            limit = self._room_beside(found)
            rows = zip(*(sources[longest.first : limit] for sources in longest.sources), strict=True)
            stored_in = [[source[0] for source in row if isinstance(source, tuple)] for row in rows]
            num_worth = len(stored_in)
            if not any(self._is_expected(block_hash) for _, block_hash in longest.stored):
                num_worth = self._index.num_worth_loading(stored_in, self._pool.block_size, self._num_queued)
            if longest.first + num_worth < longest.num_blocks:
                worth = self.find_longest(sequence, token_ids, found, longest.first + num_worth)
        return replace(worth, not_worth=[tier_name for tier_name, _ in longest.stored[len(worth.stored) :]])

    def find_longest(
        self, sequence: Sequence, token_ids: list[int], found: GroupBlocks, most_blocks: int
    ) -> StoredPrefix:
        """The longest hit with blocks of tiers after `found`, of at most `most_blocks` logical blocks."""
        pool, table, first = self._pool, sequence.table, len(found[0])

        def source(group: int, index: int) -> Source | None:
            if index < first and found[group][index] != HOLE:
                return found[group][index]
            block_hash = group_hash(table.block_hash(index, token_ids), group)
            block = pool.find(block_hash)
            return self._stored(block_hash) if block is None else block

        return StoredPrefix(first, longest_prefix(pool, most_blocks, source), [])

    def expect(self, sequence: Sequence) -> None:
        """Another engine has computed a sequence's prompt: blocks that no tier has can be fetched from there."""
        if self._disk is None or not self._disk.fetches:
            return
        num_blocks = (len(sequence.token_ids) - 1) // self._pool.block_size
        for index in range(num_blocks):
            block_hash = sequence.table.block_hash(index, sequence.token_ids)
            for group in range(self._pool.num_groups):
                self._disk.expect(group_hash(block_hash, group))
            if self._has_states and index == num_blocks - 1:
                self._disk.expect(state_hash(block_hash), is_state=True)

    def is_stored(self, block_hash: BlockHash) -> bool:
        """Whether a tier holds a block or a state."""
        return self._index.find(block_hash) is not None or self._is_expected(block_hash)

    def find_state(self, name: BlockHash) -> Stored | None:
        """Where a tier holds the state after the block of this hash, unless it is on its way up already."""
        return self._stored(state_hash(name))

    def pays(self, stored: StoredPrefix, found: GroupBlocks, num_tokens: int) -> bool:
        """Whether all of a hit fits into the pool, and loading it is faster than computing `num_tokens` tokens."""
        if stored.num_blocks > self._room_beside(found):
            return False
        if any(self._is_expected(block_hash) for _, block_hash in stored.stored):
            return True
        tier_names = [tier_name for tier_name, _ in stored.stored]
        if stored.state is not None:
            tier_name, key = stored.state
            tier_names += [tier_name] * self._index.tiers[tier_name].num_blocks(key)
        return self._index.num_worth_loading([tier_names], num_tokens, self._num_queued) == 1

    def _stored(self, block_hash: BlockHash) -> Stored | None:
        tier_name = self._index.find(block_hash) or (DISK if self._is_expected(block_hash) else None)
        return None if tier_name is None or block_hash in self._in_flight else (tier_name, block_hash)

    def _is_expected(self, block_hash: BlockHash) -> bool:
        """Whether another engine may have a block or a state, which is then read as if it were on the disk."""
        return self._disk is not None and self._disk.expects(block_hash)

    def _room_beside(self, found: GroupBlocks) -> int:
        """The most logical blocks for which the pool has room, beside those in `found` that are free now."""
        pool = self._pool
        num_taken = sum(pool.ref_counts[block] == 0 for blocks in found for block in blocks if block != HOLE)
        return len(found[0]) + (pool.num_free - num_taken) // pool.num_groups

    @property
    def _num_queued(self) -> int:
        """Reads that a new one waits for."""
        return len(self._reads) + sum(len(loading.unread) for loading in self.waiting.values())

    def pin(self, stored: StoredPrefix) -> None:
        """The plan that is being made evicts nothing of a hit that is about to start."""
        self._storing.pinned.update(block_hash for _, block_hash in stored.stored)
        if stored.state is not None:
            self._storing.pinned.add(stored.state[1])

    def start(self, sequence: Sequence, stored: StoredPrefix) -> dict[str, int]:
        """Load what `find` found, into new blocks at the end of a table whose last block is full.

        Returns the tokens by origin if the next plan loads all of them. If not, `begin` returns the sequence when it
        stops waiting.
        """
        for tier_name in stored.not_worth:
            self._index.tiers[tier_name].stats.total_recomputed += 1
        if not stored:
            return {}
        state = () if stored.state is None else (stored.state,)
        for tier_name, block_hash in reversed([*stored.stored, *state]):
            # Here too, the beginnings of prompts should survive longest. Blocks that are taken must not evict these.
            if block_hash in self._index.tiers[tier_name]:
                self._index.tiers[tier_name].touch(block_hash)
            self._in_flight.add(block_hash)
            self._storing.pinned.add(block_hash)
        loaded = sequence.table.adopt_stored(stored.sources, stored.first)
        sequence.start_from_table()
        if stored.state is not None:
            loaded.append((stored.state, stored.num_blocks - 1, self._pool.num_blocks + sequence.state))
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

    def take_failed(self) -> list[Sequence]:
        """Sequences that wait for a read that failed, one of each group."""
        groups = {sequence.group.order: sequence for sequence in self.failed if sequence in self.waiting}
        self.failed.clear()
        return list(groups.values())

    def begin(self) -> list[tuple[Sequence, dict[str, int]]]:
        """Begin a plan with what other engines stored, and with the finished reads.

        Returns (sequence, tokens by origin) of sequences that stop waiting.
        """
        if self._disk is not None:
            self._disk.follow()
        for block_hash, sequence in self._finished_reads.items():
            if sequence is None:
                self._storing.plan.cancelled.append(block_hash)
                if self._disk is not None:
                    self._disk.forget(block_hash)
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
        stats.total_loaded_bytes += self._index.tiers[tier_name].size(block_hash)
        self._index.tiers[tier_name].forget(block_hash)
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
        disk = self._disk
        if disk is None:
            return
        num_staged = sum(map(disk.num_blocks, (*self._reads, *self._finished_reads)))
        for sequence, loading in self.waiting.items():
            while loading.unread:
                num_blocks = disk.num_blocks(loading.unread[-1])
                if num_staged and num_staged + num_blocks > self._max_staged:
                    return
                num_staged += num_blocks
                block_hash = loading.unread.pop()
                self._reads[block_hash] = sequence
                self._storing.plan.reads.append(block_hash)

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

    # -- a step -------------------------------------------------------------------------------------------------------

    @property
    def has_idle_work(self) -> bool:
        """Whether there are blocks to write behind, or blocks on their way to disk."""
        return self._storing.has_work

    def finish(self, *, computes: bool) -> OffloadPlan | None:
        """Close the plan of a step, which may compute nothing. None if there is nothing to do or to wait for."""
        plan = self._storing.take_plan()
        plan.loads = [(tier_name, block_hash, block) for block_hash, (tier_name, block, _) in self._loads.items()]
        plan.wait = not computes and bool(self._reads)
        if self._reads or self._storing.waits or plan != OffloadPlan():
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
            num_loads = sum(self._host.num_blocks(key) for tier_name, key, _ in plan.loads if tier_name == HOST)
            self._index.measure_load(HOST, num_loads, result.load_seconds)
        disk = self._disk
        if disk is None:
            return
        self._storing.update(disk, result)
        for block_hash, seconds in result.read:
            self._finished_reads[block_hash] = self._reads.pop(block_hash)
            if not disk.expects(block_hash):  # the time of another engine tells nothing of this one's disk
                self._index.measure_load(DISK, disk.num_blocks(block_hash), seconds)
        for block_hash, reason in result.failed_reads:
            disk.remove(block_hash)
            disk.forget(block_hash)
            disk.stats.total_corrupt += reason == "corrupt"
            sequence_or_none = self._reads.pop(block_hash)
            if sequence_or_none is not None and self._has_states:
                self.failed.append(sequence_or_none)
            elif sequence_or_none is not None:
                self._cut(sequence_or_none, block_hash)

    def evict(self, sequence: Sequence) -> None:
        """Remove a sequence's blocks from all tiers, because their content may be wrong."""
        self._storing.evict(sequence)

    def evict_all(self) -> None:
        """Empty the tiers."""
        self._storing.evict_all()

    def stats(self) -> dict[str, TierStats]:
        return {tier_name: replace(tier.stats) for tier_name, tier in self._index.tiers.items()}
