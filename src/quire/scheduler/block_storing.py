"""BlockStoring: which blocks and recurrent states go from the pool to the tiers below it, and what the tiers evict.

An evicted block is stored before its space is written: in host memory if there is a host tier, and on disk unless the
disk has it. A block that nobody holds any more also goes to disk as soon as there is time (write-behind), so that a
later process finds it even if this one never ran out of space; an `eager` tier gets every block as soon as it is full.
The number of blocks on their way is bounded; a block
evicted beyond that is lost and counted. The beginnings of prompts are stored first.

A recurrent state is stored alike if it follows a full block; its index is its slot after the pool's blocks.
"""

from collections.abc import Callable

from quire.kv_cache.block_hash import BlockHash, group_hash, state_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.states import StatePool
from quire.kv_cache.tiers import DISK, HOST, Tier, TierIndex, num_staged_blocks
from quire.scheduler.sequence import Sequence
from quire.step import OffloadPlan, OffloadResult

WRITE_BEHIND_SHARE = 4
"""Write-behind takes one n-th of the blocks that may be on their way per step; evictions may take all."""


class BlockStoring:
    """Owned by `BlockOffload`. The pools report evicted and idle blocks and states to it."""

    def __init__(
        self, index: TierIndex, pool: BlockPool, states: StatePool | None, is_read: Callable[[BlockHash], bool]
    ) -> None:
        """`is_read`: whether a block is being read from disk, which must not evict it then."""
        self.plan = OffloadPlan()
        """The plan that is being made."""
        self.pinned: set[BlockHash] = set()
        """Blocks that this plan loads from host memory or stores there; it must not evict them."""
        self._index = index
        self._pool = pool
        self._states = states
        self._is_read = is_read
        self._idle: dict[BlockHash, int] = {}
        """Blocks to write behind; the last one is written first, or in an `eager` tier the first one."""
        self._storing: dict[BlockHash, int] = {}
        """Blocks on their way to disk, and the space they take there."""
        self._unwanted: set[BlockHash] = set()
        """Blocks on their way to disk that are evicted as soon as they are there."""
        self._host, self._disk = index.tiers.get(HOST), index.tiers.get(DISK)
        self._max_staged = 0 if self._disk is None else num_staged_blocks(self._disk.block_bytes)
        """Blocks that may be on their way to disk. A larger state goes alone."""
        self._max_bytes = 0 if self._disk is None else self._max_staged * self._disk.block_bytes
        pool.eviction_listeners.append(self._store_evicted)
        if states is not None:
            states.eviction_listeners.append(self._store_evicted_state)
        if self._disk is not None:
            pool.idle_listeners.append(self._note_idle)
            if self._disk.eager:
                pool.stored_listeners.append(lambda block, block_hash, *_: self._note_idle(block, block_hash))
            if states is not None:
                states.kept_listeners.append(self._note_idle_state)
            # The disk tier may be smaller than it was for the process that stored its blocks.
            self.plan.evicted = [(DISK, each) for each in self._disk.make_room(0, lambda each: False) or ()]

    @property
    def has_work(self) -> bool:
        """Whether there are blocks to write behind, or blocks on their way to disk."""
        return bool(self._idle) or bool(self._storing)

    @property
    def waits(self) -> bool:
        """Whether blocks are on their way to disk."""
        return bool(self._storing)

    def take_plan(self) -> OffloadPlan:
        """The plan with all that is to be stored; a new one begins."""
        if self._disk is not None and self._idle:
            self._write_behind(self._disk)
        plan, self.plan = self.plan, OffloadPlan()
        self.pinned.clear()
        return plan

    def update(self, disk: Tier, result: OffloadResult) -> None:
        """Note what has reached the disk, or has not."""
        for block_hash in result.stored:
            disk.add(block_hash, self._storing.pop(block_hash))
            disk.stats.total_saved += 1
            disk.stats.total_saved_bytes += disk.size(block_hash)
            if block_hash in self._unwanted:
                self._unwanted.discard(block_hash)
                self._evict(block_hash)
        for block_hash in result.failed_stores:
            self._storing.pop(block_hash, None)
            self._unwanted.discard(block_hash)
            disk.stats.total_dropped += 1
        if result.stopped:
            disk.stats.stopped = True
            self._idle.clear()

    def _store_evicted_state(self, slot: int, name: BlockHash) -> None:
        assert self._states is not None, "only a pool of states calls this"
        # What the step stores it stores before it copies states.
        self._store_evicted(self._pool.num_blocks + self._states.origin(slot), state_hash(name))

    def _note_idle_state(self, slot: int, name: BlockHash) -> None:
        self._note_idle(self._pool.num_blocks + slot, state_hash(name))

    def _space(self, tier: Tier, block: int) -> int:
        return tier.block_bytes if block < self._pool.num_blocks else tier.state_bytes

    def _store_evicted(self, block: int, block_hash: BlockHash) -> None:
        self._idle.pop(block_hash, None)
        host, disk = self._host, self._disk
        if host is not None:
            if block_hash in host:
                host.touch(block_hash)
            elif (room := host.make_room(self._space(host, block), self.pinned.__contains__)) is None:
                host.stats.total_dropped += 1
            else:
                self.plan.evicted += [(HOST, other) for other in room]
                self.plan.stores.append((HOST, block_hash, block))
                self.pinned.add(block_hash)
                host.add(block_hash, self._space(host, block))
                host.stats.total_saved += 1
                host.stats.total_saved_bytes += host.size(block_hash)
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
        room, reserved = None, sum(self._storing.values()) + self._space(disk, block)
        if not self._storing or reserved <= self._max_bytes:
            room = disk.make_room(reserved, lambda other: self._is_read(other) or other in self.pinned)
        if room is None:
            disk.stats.total_dropped += 1
            return
        self.plan.evicted += [(DISK, other) for other in room]
        self.plan.stores.append((DISK, block_hash, block))
        self._storing[block_hash] = self._space(disk, block)

    def _write_behind(self, disk: Tier) -> None:
        quota = self._max_staged - len(self._storing)
        if not disk.eager:
            quota = min(quota, max(1, self._max_staged // WRITE_BEHIND_SHARE))
        while self._idle and quota > 0:
            # Another engine asks for the beginning of a prompt first, which filled first.
            block_hash = next(iter(self._idle)) if disk.eager else next(reversed(self._idle))
            block = self._idle.pop(block_hash)
            if self._storing and sum(self._storing.values()) + self._space(disk, block) > self._max_bytes:
                self._idle[block_hash] = block  # a state that waits for the blocks before it
                return
            source = self._source(block_hash, block)
            if source is not None and block_hash not in disk and block_hash not in self._storing:
                self._store_on_disk(disk, block_hash, source)
                quota -= 1

    def _source(self, block_hash: BlockHash, block: int) -> int | None:
        """Where an idle block or state lies before the coming step's copies; None if it is gone."""
        pool, states = self._pool, self._states
        if block < pool.num_blocks:
            return block if pool.hashes[block] == block_hash else None
        assert states is not None, "only a pool of states has such indices"
        slot = block - pool.num_blocks
        return pool.num_blocks + states.origin(slot) if states.slot_of(state_hash(block_hash)) == slot else None

    # -- evicting -----------------------------------------------------------------------------------------------------

    def evict(self, sequence: Sequence) -> None:
        """Remove a sequence's blocks from all tiers, because their content may be wrong."""
        for index in range(sequence.table.num_tokens // self._pool.block_size):
            block_hash = sequence.table.block_hash(index, sequence.token_ids)
            self._evict(state_hash(block_hash))
            for group in range(self._pool.num_groups):
                self._evict(group_hash(block_hash, group))

    def evict_all(self) -> None:
        """Empty the tiers."""
        for tier in self._index.tiers.values():
            for block_hash in tier.hashes():
                self._evict(block_hash)
        for block_hash in (*self._idle, *self._storing):
            self._evict(block_hash)

    def _evict(self, block_hash: BlockHash) -> None:
        self.plan.evicted += self._index.remove(block_hash)
        self._idle.pop(block_hash, None)
        if block_hash in self._storing:
            self._unwanted.add(block_hash)
