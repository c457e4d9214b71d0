"""BlockPool: which blocks are free, who shares which, and which hold content that can be found again.

A block is an index. It is *used* while its reference count is positive, and on the free list otherwise. A full block
may have a hash (see `block_hash`). When its last reference goes it keeps the hash, so a later request with the same
prefix finds it until its space is needed. A partly filled block has no hash; it can be retained and found by its
tokens, and the sequence that finds it fills it up. The pool knows nothing of sequences or tensors, and has no clock.
All KV groups take their blocks here: blocks of one size, one free list, one order of eviction. A block's hash covers
its group.

The free list is in eviction order: blocks without content first, then blocks that can be found, least recently freed
first. It is doubly linked, because a prefix hit takes a block out of the middle. The links are two flat lists of
integers instead of node objects, so that a pool of a million blocks starts in a fraction of a second.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from quire.errors import QuireError
from quire.kv_cache.block_hash import BlockHash, TokenKey
from quire.kv_cache.partial_block_index import PartialBlockIndex
from quire.kv_groups import first_kept_block, most_blocks

BlockListener = Callable[[int, BlockHash], None]
"""Called with a block and its hash."""

StoredListener = Callable[[int, BlockHash, BlockHash, Sequence[TokenKey] | None], None]
"""Called with a block, its hash, its parent's hash (b"" if unknown) and its tokens (None if unknown)."""


class OutOfBlocksError(QuireError):
    """No block is free. Callers check `num_free` first; reaching this is a bug."""


class BlockPool:
    """`num_blocks` blocks of `block_size` token slots each. All operations are O(1) per block."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        windows: Sequence[int] = (0,),
        window_alignment: int = 1,
        enable_prefix_caching: bool = True,
    ) -> None:
        """`windows` has the window of each KV group, 0 for full attention. Sequences keep a window's blocks from a
        multiple of `window_alignment` tokens on (see `first_kept_block`)."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = tuple(windows)
        self.num_groups = len(self.windows)
        self.has_windows = any(self.windows)
        self.window_alignment = window_alignment
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self.fill = [0] * num_blocks
        """Slots written since the block was last taken."""
        self.hashes: list[BlockHash | None] = [None] * num_blocks
        self.num_free = num_blocks
        self.num_references = 0
        """Sum of all reference counts."""
        self.num_filled_slots = 0
        """Sum of `fill` over used blocks."""
        self.num_cached_free = 0
        self.now = 0.0
        """Seconds at the last `set_time`; the pool keeps no clock."""
        self.taken_at = [0.0] * num_blocks
        """`now` when the block was last taken from the free list."""
        self.group_of = bytearray(num_blocks)
        """The KV group that last took the block."""
        self.total_given_back = 0
        """Blocks that sequences gave back while they ran, because no later token sees them."""
        self.total_evictions = 0
        self.total_block_copies = 0
        self.eviction_listeners: list[BlockListener] = []
        """Called for a block with a hash that `allocate` takes, while its content is still there."""
        self.idle_listeners: list[BlockListener] = []
        """Called for a block with a hash when its last reference goes."""
        self.stored_listeners: list[StoredListener] = []
        """Called for a block that has got a hash."""
        self.removed_listeners: list[BlockListener] = []
        """Called for a block that lost its hash, but was not evicted: its content may be wrong, or the cache was
        emptied."""
        self.pinned: Counter[int] = Counter()
        """Used blocks that registered prefixes hold → by how many prefixes. They never lose their hash."""
        self.children = PartialBlockIndex()
        self._copied_from: list[int] = []
        self._by_hash: dict[BlockHash, int] = {}
        self._aliases: dict[BlockHash, int] = {}
        """Further hashes of pinned blocks: those of a registered prefix under other salts."""
        # The entry past the last block is the list's anchor: its next is the head, its previous the tail.
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._prev: list[int] = [num_blocks, *range(num_blocks)]

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_allocated_slots(self) -> int:
        return (self.num_blocks - self.num_free) * self.block_size

    @property
    def num_shared_slots(self) -> int:
        """Slots that sharing saves: what the tables would take without it, less what they take."""
        return (self.num_references - self.num_used) * self.block_size

    @property
    def num_wasted_slots(self) -> int:
        """Allocated slots that hold no token."""
        return self.num_allocated_slots - self.num_filled_slots

    def first_kept(self, group: int, position: int) -> int:
        """The first logical block that a KV group must still hold for a token at `position`."""
        return first_kept_block(position, self.windows[group], self.block_size, self.window_alignment)

    def most_blocks_by_group(self, num_tokens: int) -> list[int]:
        """The most blocks that a sequence of at most `num_tokens` tokens must hold at once, for each KV group."""
        return [most_blocks(num_tokens, window, self.block_size, self.window_alignment) for window in self.windows]

    def most_blocks(self, num_tokens: int) -> int:
        """The same of all KV groups together."""
        return sum(self.most_blocks_by_group(num_tokens))

    def window_blocks(self, num_tokens: int) -> int:
        """The same of all window groups together."""
        return self.most_blocks(num_tokens) - self.windows.count(0) * -(-num_tokens // self.block_size)

    def blocks_after(self, num_tokens: int) -> int:
        """Blocks of all KV groups that the token after `num_tokens` tokens reads."""
        blocks = -(-num_tokens // self.block_size)
        return sum(blocks - self.first_kept(group, num_tokens) for group in range(self.num_groups))

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """`most_blocks` while up to `chunk` tokens are computed in one step: a window group then holds the blocks of
        all of them beside those that the first of them sees."""
        size, blocks = self.block_size, -(-num_tokens // self.block_size)
        return sum(
            min(blocks, most_blocks(num_tokens, window, size, self.window_alignment) + -(-chunk // size))
            for window in self.windows
        )

    def set_time(self, now: float) -> None:
        """Blocks taken from here on are taken at `now`."""
        self.now = now

    def allocate(self, group: int = 0) -> int:
        """Take the first block of the free list for a KV group. Its old content can no longer be found."""
        anchor = self.num_blocks
        block = self._next[anchor]
        if block == anchor:
            raise OutOfBlocksError(f"all {self.num_blocks} blocks are in use")
        self._unlink(block)
        self.num_free -= 1
        self.children.remove(block)
        block_hash = self.hashes[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self.hashes[block] = None
            self.num_cached_free -= 1
            self.total_evictions += 1
            for listener in self.eviction_listeners:
                listener(block, block_hash)
        self.taken_at[block] = self.now
        self.group_of[block] = group
        self.ref_counts[block] = 1
        self.num_references += 1
        self.fill[block] = 0
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block. A block that was found may be on the free list, and leaves it.

        A retained, partly filled block now belongs to its finder alone, which says by `write` how much of it to use.
        """
        if self.ref_counts[block] == 0:
            self._unlink(block)
            self.num_free -= 1
            if self.hashes[block] is None:
                self.children.remove(block)
            else:
                self.num_cached_free -= 1
            self.num_filled_slots += self.fill[block]
        self.ref_counts[block] += 1
        self.num_references += 1

    def release(self, block: int) -> None:
        """Drop a reference. With the last one the block joins the free list, at its tail if it can be found."""
        count = self.ref_counts[block] - 1
        self.ref_counts[block] = count
        self.num_references -= 1
        if count:
            return
        self.num_free += 1
        self.num_filled_slots -= self.fill[block]
        block_hash = self.hashes[block]
        if block_hash is None and block not in self.children:
            self._link_first(block)
            return
        self._link(self._prev[self.num_blocks], block)
        if block_hash is not None:
            self.num_cached_free += 1
            for listener in self.idle_listeners:
                listener(block, block_hash)

    def retain_partial(self, block: int, parent: BlockHash, token_ids: Sequence[TokenKey]) -> None:
        """Keep a partly filled block findable after its only holder has released it, which it is about to do.

        The block holds `token_ids` and follows the block with the hash `parent`. Nothing happens if others hold it, or
        if its tokens can be found elsewhere.
        """
        if not self.enable_prefix_caching or self.ref_counts[block] > 1 or self.hashes[block] is not None:
            return
        found = self.children.longest(parent, token_ids)
        if found is None or found[1] < len(token_ids):
            self._add_child(block, parent, token_ids)

    def release_after_copy(self, block: int) -> None:
        """Drop a reference to a block that this step copies; nothing takes its space before `copies_are_done`.

        If it were taken in the same step, it could be the destination of another copy, and the order would matter.
        """
        if self.ref_counts[block] > 1:
            self.release(block)
        else:
            self._copied_from.append(block)

    def copies_are_done(self) -> None:
        """All planned copies were made or rolled back: release their sources."""
        while self._copied_from:
            self.release(self._copied_from.pop())

    def write(self, block: int, fill: int) -> None:
        """A block that its only holder writes to is now filled up to `fill` slots."""
        self.num_filled_slots += fill - self.fill[block]
        self.fill[block] = fill

    def count_filled(self, num_slots: int) -> None:
        """Count slots as filled; `set_counted_fill` says later which. The decode batch counts its blocks at once."""
        self.num_filled_slots += num_slots

    def set_counted_fill(self, block: int, fill: int) -> None:
        """Set the fill of a block whose slots `count_filled` has counted."""
        self.fill[block] = fill

    def copy_on_write(self, block: int) -> int:
        """Replace one holder's reference to a block by a new block, which gets a copy of its content in this step."""
        copy = self.allocate(self.group_of[block])
        self.total_block_copies += 1
        self.release_after_copy(block)
        return copy

    def find(self, block_hash: BlockHash) -> int | None:
        """The block with this hash, used or free. Share it before anything else is allocated."""
        if self._aliases and (block := self._aliases.get(block_hash)) is not None:
            return block
        return self._by_hash.get(block_hash)

    def set_hash(
        self, block: int, block_hash: BlockHash, parent: BlockHash = b"", token_ids: Sequence[TokenKey] | None = None
    ) -> None:
        """Make a full block findable. Of several blocks with the same content only the first gets the hash.

        With its parent's hash and its tokens, it can also be found by the first of its tokens.
        """
        if self.enable_prefix_caching and self.hashes[block] is None and self.find(block_hash) is None:
            self.hashes[block] = block_hash
            self._by_hash[block_hash] = block
            if token_ids is not None:
                self._add_child(block, parent, token_ids)
            for listener in self.stored_listeners:
                listener(block, block_hash, parent, token_ids)

    def remove_hash(self, block: int) -> None:
        """Make a used block unfindable, because its content may be wrong. Pinned blocks keep their hash."""
        block_hash = self.hashes[block]
        if block_hash is not None and block not in self.pinned:
            del self._by_hash[block_hash]
            self.hashes[block] = None
            self.children.remove(block)
            for listener in self.removed_listeners:
                listener(block, block_hash)

    def clear_hashes(self) -> None:
        """Empty the prefix cache: only pinned blocks stay findable. Block tables are untouched.

        Blocks that were written once are taken first from now on: their memory is there already.
        """
        evicted = {block for block in (*self._by_hash.values(), *self.children) if block not in self.pinned}
        for block in [block for block in self.free_order() if block in evicted][::-1]:
            self._unlink(block)
            self._link_first(block)
        for block in evicted:
            block_hash, self.hashes[block] = self.hashes[block], None
            self.children.remove(block)
            if block_hash is not None:
                for listener in self.removed_listeners:
                    listener(block, block_hash)
        self._by_hash = {block_hash: block for block_hash, block in self._by_hash.items() if block in self.pinned}
        self.num_cached_free = 0

    def pin(self, blocks: Iterable[int]) -> None:
        """Pin used blocks that have a hash, once more than before. Their holder keeps its references."""
        self.pinned.update(blocks)

    def unpin(self, blocks: Iterable[int]) -> None:
        """Undo one `pin` of each block."""
        self.pinned.subtract(blocks)
        self.pinned += Counter()  # drops what has come to 0

    def set_aliases(self, aliases: dict[BlockHash, int]) -> None:
        """Replace the further hashes under which pinned blocks are found."""
        self._aliases = aliases

    def free_order(self) -> Iterable[int]:
        """Free blocks in the order in which they would be taken."""
        block = self._next[self.num_blocks]
        while block != self.num_blocks:
            yield block
            block = self._next[block]

    def _add_child(self, block: int, parent: BlockHash, token_ids: Sequence[TokenKey]) -> None:
        evicted = self.children.add(block, parent, token_ids)
        if evicted is not None and self.hashes[evicted] is None:  # free, and now without content
            self._unlink(evicted)
            self._link_first(evicted)

    def _unlink(self, block: int) -> None:
        """Take a block out of the free list."""
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before

    def _link_first(self, block: int) -> None:
        self._link(self.num_blocks, block)

    def _link(self, before: int, block: int) -> None:
        """Put a block into the free list after another block, or after the anchor."""
        after = self._next[before]
        self._next[before] = block
        self._prev[block] = before
        self._next[block] = after
        self._prev[after] = block
