"""StatePool: the slots of recurrent states, and the snapshots among them that the prefix cache can find.

The state of a sequence is one object of constant size for all recurrent layers. It is no block: it stands for all
tokens before a position, cannot be cut, and is overwritten by every token. So each running sequence owns a slot, and
what the prefix cache keeps are snapshots: states at chosen positions, each in a slot of its own. A snapshot is named
like the blocks: by the hash of its last full block, or by a hash of that and the tokens after it.

A slot is free, owned by a sequence, held for a save that a step is making, or a snapshot. An owner that ends hands its
slot over as a snapshot, without a copy. Snapshots are evicted least recently used first, whenever a slot is needed;
pinned ones never are. `copies` are orders for the next step: what is found is copied to a sequence's own slot, because
that is overwritten. They are executed in their order before the step computes, so a slot may be given on at once.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from quire.errors import QuireError
from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.block_table import BlockTable
from quire.memory_stats import StateStats

NO_STATE = -1
ZERO_STATE = -1
"""The source of a copy that writes the state before the first token."""

StateCopy = tuple[int, int]
"""(source, destination): slots."""


class OutOfStatesError(QuireError):
    """No slot is free and no snapshot can be evicted. The pool is made too large for that; reaching this is a bug."""


class Snapshot(NamedTuple):
    """A state that the prefix cache can find."""

    slot: int
    parent: BlockHash
    """The hash of the last full block before its position."""
    length: int
    """Tokens after that block, fewer than a block."""


class FoundState(NamedTuple):
    """A snapshot of the beginning of a sequence."""

    num_tokens: int
    slot: int
    """NO_STATE: it is stored in a tier."""


Listener = Callable[[int, BlockHash], None]
"""Called with the slot and the name of a snapshot at the end of a block."""


class StatePool:
    """`num_slots` slots. `num_owners` of them are reserved for the sequences that run at once."""

    def __init__(self, num_slots: int, num_owners: int, *, slot_bytes: int = 0) -> None:
        if num_slots < num_owners:
            raise ValueError(f"{num_owners} sequences run at once, and there are {num_slots} slots for their states")
        self.stats = StateStats(num_slots=num_slots, slot_bytes=slot_bytes)
        self.max_snapshots = num_slots - num_owners
        """Slots that no running sequence can claim."""
        self.copies: list[StateCopy] = []
        """For the next step."""
        self.pinned: Counter[BlockHash] = Counter()
        """Name of a snapshot that is never evicted → number of prefixes that pin it."""
        self.kept_listeners: list[Listener] = []
        self.eviction_listeners: list[Listener] = []
        self._free = list(range(num_slots - 1, -1, -1))
        self._num_held = 0
        self._snapshots: OrderedDict[BlockHash, Snapshot] = OrderedDict()
        """By name, least recently used first."""
        self._tails: dict[BlockHash, dict[BlockHash, int]] = {}
        """Hash of a full block → names of the snapshots inside the block after it, with their `length`."""
        self._aliases: Mapping[BlockHash, BlockHash] = {}

    # -- slots --------------------------------------------------------------------------------------------------------

    def take(self, source: int | None = ZERO_STATE) -> int:
        """A slot for a running sequence, whose state begins as that of slot `source`, or as the one before any token.

        If `source` is the snapshot that must be evicted, the sequence gets that slot. None: its state will be loaded.
        """
        slot = self._take()
        self.stats.num_running += 1
        if source is not None:
            self.copy(source, slot)
        return slot

    def copy(self, source: int, slot: int) -> None:
        """Let the next step begin with such a copy."""
        if source != slot:
            self.copies.append((source, slot))

    def give(self, slot: int) -> None:
        """A running sequence no longer needs its slot."""
        self.stats.num_running -= 1
        self._free.append(slot)

    def hold(self) -> int | None:
        """A slot into which the coming step saves a state; None if running sequences may need all that are left."""
        if self._num_held + len(self.pinned) >= self.max_snapshots:
            self.stats.total_skipped += 1
            return None
        slot = self._take()
        self._num_held += 1
        return slot

    def drop(self, slot: int) -> None:
        """Free a held slot: its save was not made or is no longer needed."""
        self._num_held -= 1
        self._free.append(slot)

    def exchange(self, slot: int, held: int) -> int:
        """A running sequence goes on in a held slot and gives its own back. Returns the slot it goes on in."""
        self._num_held -= 1
        self._free.append(slot)
        return held

    @property
    def num_for_drafts(self) -> int:
        """Slots that drafts may hold now: at most half of what is left to snapshots, so that most of these stay."""
        return max(0, (self.max_snapshots + 1) // 2 - self._num_held - len(self.pinned))

    def take_copies(self) -> list[StateCopy]:
        """The copies ordered since the last call."""
        copies, self.copies = self.copies, []
        return copies

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        for name in self._snapshots:
            if name not in self.pinned:
                self.stats.total_evicted += 1
                snapshot = self._remove(name)
                if not snapshot.length:
                    for listener in self.eviction_listeners:
                        listener(snapshot.slot, name)
                return snapshot.slot
        raise OutOfStatesError(f"all {self.stats.num_slots} slots of recurrent states are in use")

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def keep(self, slot: int, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """A running sequence hands its slot over: it holds the state after `num_tokens` tokens."""
        self.stats.num_running -= 1
        self._add(slot, table, token_ids, num_tokens)

    def keep_held(self, slot: int, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """A step has saved the state after `num_tokens` tokens into a held slot."""
        self._num_held -= 1
        self._add(slot, table, token_ids, num_tokens)

    def find(self, table: BlockTable, token_ids: Sequence[int], limit: int) -> FoundState | None:
        """The snapshot of the longest beginning of `token_ids`, of at most `limit` tokens."""
        size = table.block_size
        for num_full in range(limit // size, -1, -1):
            parent = table.prefix_hash(token_ids, num_full * size)
            tails = self._tails.get(parent, {})
            for length in sorted(set(tails.values()), reverse=True):
                end = num_full * size + length
                if end <= limit and (name := table.prefix_hash(token_ids, end)) in tails:
                    return self._touch(name, end)
            if num_full and (name := self._aliases.get(parent, parent)) in self._snapshots:
                return self._touch(name, num_full * size)
        return None

    def holds(self, name: BlockHash) -> bool:
        """Whether there is a snapshot of this name."""
        return self._aliases.get(name, name) in self._snapshots

    def slot_of(self, name: BlockHash) -> int:
        """The slot of the snapshot of this name; NO_STATE if there is none."""
        snapshot = self._snapshots.get(self._aliases.get(name, name))
        return NO_STATE if snapshot is None else snapshot.slot

    def origin(self, slot: int) -> int:
        """Where the content that a slot will have after the copies ordered so far lies before them."""
        for source, destination in reversed(self.copies):
            if destination == slot:
                slot = source
        return slot

    def forget(self, hashes: Collection[BlockHash]) -> None:
        """Remove the snapshots at the end of these blocks and inside the blocks after them: they may be wrong."""
        for block_hash in hashes:
            for name in (block_hash, *self._tails.get(block_hash, ())):
                if name in self._snapshots and name not in self.pinned:
                    self._free.append(self._remove(name).slot)

    def clear(self) -> None:
        """Remove all snapshots but the pinned ones."""
        for name in [name for name in self._snapshots if name not in self.pinned]:
            self._free.append(self._remove(name).slot)

    def pin(self, name: BlockHash) -> None:
        """Never evict the snapshot of this name, which may still come, until as many `unpin`."""
        self.pinned[name] += 1

    def unpin(self, name: BlockHash) -> None:
        """Undo one `pin`."""
        self.pinned[name] -= 1
        self.pinned += Counter()  # drops what has come to 0

    def set_aliases(self, aliases: Mapping[BlockHash, BlockHash]) -> None:
        """Further names of pinned snapshots."""
        self._aliases = aliases

    def snapshots(self) -> Iterable[tuple[BlockHash, Snapshot]]:
        """Names and snapshots, least recently used first."""
        return self._snapshots.items()

    def report(self) -> StateStats:
        """The present counts."""
        pinned = sum(1 for name in self.pinned if name in self._snapshots)
        return replace(self.stats, num_snapshots=len(self._snapshots), num_pinned=pinned)

    def _add(self, slot: int, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> None:
        name = table.prefix_hash(token_ids, num_tokens)
        if name in self._snapshots:
            self._snapshots.move_to_end(name)
            self._free.append(slot)
            return
        length = num_tokens % table.block_size
        parent = table.prefix_hash(token_ids, num_tokens - length)
        self._snapshots[name] = Snapshot(slot, parent, length)
        if length:
            self._tails.setdefault(parent, {})[name] = length
        self.stats.total_saved += 1
        if not length:
            for listener in self.kept_listeners:
                listener(slot, name)

    def _touch(self, name: BlockHash, num_tokens: int) -> FoundState:
        self._snapshots.move_to_end(name)
        return FoundState(num_tokens, self._snapshots[name].slot)

    def _remove(self, name: BlockHash) -> Snapshot:
        snapshot = self._snapshots.pop(name)
        if snapshot.length:
            tails = self._tails[snapshot.parent]
            del tails[name]
            if not tails:
                del self._tails[snapshot.parent]
        return snapshot
