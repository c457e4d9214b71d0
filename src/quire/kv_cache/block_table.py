"""BlockTable: one sequence's view of the pool, from logical block to physical block (paper, section 4.2–4.4).

Blocks are taken as tokens come. `fork` shares every block, also a partly filled last one. The first write to a block
that is shared or has a hash gets a copy of it (copy-on-write); the (source, destination) pair goes to the runner with
the step. `free` gives the last block back first, so that the beginnings of prompts survive longest in the prefix cache.

There is a list of blocks for each KV group. All have an entry for every logical block; where a window group has given
its block back, since no later token sees it, the entry is HOLE.
"""

from collections.abc import Sequence
from itertools import chain

from quire.kv_cache.block_hash import BlockHash, TokenKey, find_extras, group_hash, hash_block, token_keys
from quire.kv_cache.block_pool import BlockPool, OutOfBlocksError
from quire.kv_cache.prefix_search import Source, Stored, longest_prefix
from quire.request import InputSpan

BlockCopies = list[tuple[int, int]]
"""(source, destination) blocks, in the order in which they must be copied."""

GroupBlocks = list[list[int]]
"""For each KV group a physical block, or HOLE, per logical block; all lists have the same length."""

HOLE = -1
"""In place of a block that a window group does not hold. Nothing reads or writes there."""


class BlockTable:
    """The blocks that hold the first `num_tokens` tokens of a sequence.

    `root` is the parent hash of its first block; `inputs` are those of the sequence's prompt, which its hashes cover.
    """

    __slots__ = (
        "_copied_at",
        "_first_kept",
        "_hashes",
        "_inputs",
        "_num_hashed",
        "_pool",
        "_room",
        "_root",
        "groups",
        "num_tokens",
    )

    def __init__(self, pool: BlockPool, root: BlockHash = b"", inputs: Sequence[InputSpan] = ()) -> None:
        self.groups: GroupBlocks = [[] for _ in pool.windows]
        self.num_tokens = 0
        self._pool = pool
        self._root = root
        self._inputs = inputs
        self._hashes: list[BlockHash] = []
        """Hashes of the leading logical blocks, before the KV group goes into them."""
        self._num_hashed = 0
        self._copied_at = -1
        """Number of tokens in the table when a block was copied last."""
        self._first_kept = 0
        """Window groups have given back what no token from here on sees."""
        self._room = 0
        """Tokens that surely fit into the last blocks without a copy. 0 also means: not known."""

    def know_hashes(self, hashes: Sequence[BlockHash]) -> None:
        """Take hashes of the leading blocks that were computed elsewhere, before the first is needed here."""
        self._hashes = list(hashes)

    @property
    def blocks(self) -> list[int]:
        """The blocks of the first KV group."""
        return self.groups[0]

    @property
    def held_blocks(self) -> list[int]:
        """All blocks that the table holds, of all KV groups."""
        if self._pool.num_groups == 1 and not self._pool.has_windows:
            return self.groups[0]
        return [block for blocks in self.groups for block in blocks if block != HOLE]

    def entries(self, row: int, first: int) -> list[tuple[int, int, int, list[int]]]:
        """The entries from logical block `first` on, as `StepPlan.new_blocks` has them."""
        if first == len(self.groups[0]):
            return []
        if self._pool.num_groups == 1:
            return [(row, 0, first, self.groups[0][first:])]
        return [(row, group, first, blocks[first:]) for group, blocks in enumerate(self.groups)]

    def num_appendable(self) -> int:
        """The most tokens that `append` could take now."""
        pool, size = self._pool, self._pool.block_size
        used, num_free = self.num_tokens % size, pool.num_free - self.num_copies_to_come
        if num_free < 0:
            return 0
        return (size - used if used else 0) + num_free // pool.num_groups * size

    @property
    def blocks_to_copy(self) -> list[int]:
        """The last blocks that the next `append` copies before it writes to them."""
        if not self.num_tokens % self._pool.block_size:
            return []
        return [blocks[-1] for blocks in self.groups if self._write_needs_copy(blocks[-1])]

    @property
    def num_copies_to_come(self) -> int:
        """How many blocks the next `append` copies."""
        return len(self.blocks_to_copy)

    def append(self, num_tokens: int, copies: BlockCopies) -> int:
        """Make room for `num_tokens` ≥ 1 more tokens, which will be written in this step.

        Adds a copy-on-write pair to `copies` for a last block that may not be written in place. Returns the index of
        the first logical block that changed, or the number of blocks when none did. Raises `OutOfBlocksError`, with
        nothing changed, if the pool has not enough free blocks.
        """
        pool, size = self._pool, self._pool.block_size
        if num_tokens <= self._room:
            # Nearly every append: one token into blocks that have room and are not shared.
            self._room -= num_tokens
            self.num_tokens += num_tokens
            for blocks in self.groups:
                pool.write(blocks[-1], size - self._room)
            return len(self.groups[0])
        used, end = self.num_tokens % size, self.num_tokens + num_tokens
        changed = len(self.groups[0])
        missing = -(-end // size) - changed
        copied = [blocks for blocks in self.groups if self._write_needs_copy(blocks[-1])] if used else ()
        if missing * pool.num_groups + len(copied) > pool.num_free:
            needed = missing * pool.num_groups + len(copied)
            raise OutOfBlocksError(f"{needed} blocks are needed and {pool.num_free} are free")
        if copied:
            changed -= 1
            self._copied_at = self.num_tokens
            for blocks in copied:
                shared, blocks[-1] = blocks[-1], pool.copy_on_write(blocks[-1])
                copies.append((shared, blocks[-1]))
        for group, blocks in enumerate(self.groups):
            if used:
                pool.write(blocks[-1], min(size, used + num_tokens))
            for left in range(missing, 0, -1):
                blocks.append(pool.allocate(group))
                pool.write(blocks[-1], size if left > 1 else (end - 1) % size + 1)
        self.num_tokens = end
        self._room = -end % size
        return changed

    @property
    def has_room(self) -> bool:
        """Whether the last blocks have a free slot and are not shared."""
        return self._room > 0

    def catch_up(self, num_tokens: int) -> None:
        """The table now holds `num_tokens`: the new tokens went into free slots of its last blocks.

        `BlockPool.count_filled` counted them as they came.
        """
        if num_tokens > self.num_tokens:
            self._room = max(0, self._room - (num_tokens - self.num_tokens))
            self.num_tokens = num_tokens
            for blocks in self.groups:
                self._pool.set_counted_fill(blocks[-1], (num_tokens - 1) % self._pool.block_size + 1)

    def give_back(self, num_computed_tokens: int) -> None:
        """Give back the blocks of window groups that no token from `num_computed_tokens` on sees.

        They keep their hashes. So many tokens are computed; those that the table has not counted yet are in its last
        blocks.
        """
        pool = self._pool
        if not pool.has_windows:
            return
        self.catch_up(num_computed_tokens)
        for group, window in enumerate(pool.windows):
            if window:
                blocks, first = self.groups[group], pool.first_kept(group, num_computed_tokens)
                for index in range(pool.first_kept(group, self._first_kept), first):
                    if blocks[index] != HOLE:
                        pool.release(blocks[index])
                        pool.total_given_back += 1
                        blocks[index] = HOLE
        self._first_kept = max(self._first_kept, num_computed_tokens)

    def serves(self, num_tokens: int) -> bool:
        """Whether the table holds all blocks that the token after its first `num_tokens` tokens sees."""
        pool, end = self._pool, -(-num_tokens // self._pool.block_size)
        return num_tokens <= self.num_tokens and all(
            HOLE not in blocks[pool.first_kept(group, num_tokens) : end] for group, blocks in enumerate(self.groups)
        )

    def share_prefix(self, found: GroupBlocks, num_blocks: int) -> GroupBlocks:
        """`found` for another table that begins with the first `num_blocks` blocks of this one: this table's own blocks
        take the place of found ones, and stand alone where no more was found and they suffice."""
        if len(found[0]) > num_blocks:
            return [
                [mine if mine != HOLE else theirs for mine, theirs in zip(blocks[:num_blocks], other, strict=False)]
                + other[num_blocks:]
                for blocks, other in zip(self.groups, found, strict=True)
            ]
        own = [blocks[:num_blocks] for blocks in self.groups]
        return own if self.serves(num_blocks * self._pool.block_size) else found

    def fork(self, num_tokens: int | None = None) -> "BlockTable":
        """A table that shares the blocks of the first `num_tokens` tokens (all by default), which it must serve."""
        pool = self._pool
        child = BlockTable(pool, self._root, self._inputs)
        child.num_tokens = self.num_tokens if num_tokens is None else num_tokens
        end, full = -(-child.num_tokens // pool.block_size), child.num_tokens // pool.block_size
        child.groups = [blocks[:end] for blocks in self.groups]
        child._hashes = self._hashes[:full]
        child._num_hashed = min(self._num_hashed, full)
        for block in child.held_blocks:
            pool.share(block)
        self._room = 0
        return child

    def free(self, stored: Sequence[int] = ()) -> None:
        """Give every block back. The hashes stay known, so that resuming can look for them.

        `stored` are the tokens whose KV is in the blocks. If they end inside a block, that block is retained for
        sequences that begin with the same tokens.
        """
        pool = self._pool
        full, used = divmod(len(stored), pool.block_size)
        if used and len(stored) > self._copied_at:  # else the copy is planned, and the step may be rolled back
            parent, keys = self._parent(full, stored), self._keys(full, stored[-used:])
            for group, blocks in enumerate(self.groups):
                pool.retain_partial(blocks[full], group_hash(parent, group), keys)
        release = pool.release
        # The last logical block comes first, with all its groups.
        blocks = self.groups[0] if pool.num_groups == 1 else list(chain.from_iterable(zip(*self.groups, strict=True)))
        for block in reversed(blocks):
            if block != HOLE:
                release(block)
        self.groups = [[]] if pool.num_groups == 1 else [[] for _ in self.groups]
        self.num_tokens = self._room = self._num_hashed = self._first_kept = 0
        self._copied_at = -1

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens only, and give back the blocks that no longer hold any."""
        size = self._pool.block_size
        num_blocks, used = -(-num_tokens // size), num_tokens % size
        for blocks in self.groups:
            for block in reversed(blocks[num_blocks:]):
                if block != HOLE:
                    self._pool.release(block)
            del blocks[num_blocks:]
            if used and not self._write_needs_copy(blocks[-1]):
                self._pool.write(blocks[-1], used)
        self.num_tokens, self._room = num_tokens, 0
        self._num_hashed = min(self._num_hashed, num_tokens // size)

    def find_prefix(self, token_ids: Sequence[int]) -> GroupBlocks:
        """Blocks of the pool that already hold the longest findable prefix of `token_ids`, for `adopt`.

        The last token is never covered: its logits are needed, so at least one token must be computed.
        """
        pool = self._pool
        if not pool.enable_prefix_caching:
            return [[] for _ in pool.windows]

        def find(group: int, index: int) -> int | None:
            return pool.find(group_hash(self.block_hash(index, token_ids), group))

        found = longest_prefix(pool, (len(token_ids) - 1) // pool.block_size, find)
        return [[block if isinstance(block, int) else HOLE for block in blocks] for blocks in found]

    def match_partial(self, token_ids: Sequence[int], num_found: int) -> tuple[list[int], int] | None:
        """How far the findable prefix goes on inside a block, after `num_found` blocks from `find_prefix`.

        Returns a block of each KV group and a count: their first `count` ≥ 1 tokens, not all of them, are the next of
        `token_ids`. Or None.
        """
        pool = self._pool
        start = num_found * pool.block_size
        wanted = token_ids[start : min(start + pool.block_size, len(token_ids)) - 1]
        if not wanted or not pool.enable_prefix_caching:
            return None
        parent, keys = self._parent(num_found, token_ids), self._keys(num_found, wanted)
        blocks, count = [], len(wanted)
        for group in range(pool.num_groups):
            longest = pool.children.longest(group_hash(parent, group), keys)
            if longest is None:
                return None
            blocks.append(longest[0])
            count = min(count, longest[1])
        return blocks, count

    def adopt(self, found: GroupBlocks, inside: tuple[list[int], int] | None = None) -> None:
        """Append blocks from `find_prefix` to a table that is empty or whose last block is full.

        `inside` is what `match_partial` found: blocks and how many of their tokens to use. The next `append` copies
        such a block, as after a fork, or goes on in it if it was retained partly filled.
        """
        pool = self._pool
        for blocks, more in zip(self.groups, found, strict=True):
            for block in more:
                if block != HOLE:
                    pool.share(block)
            blocks += more
        self.num_tokens += len(found[0]) * pool.block_size
        self._num_hashed = len(self.groups[0])
        if inside is not None:
            count = inside[1]
            for blocks, block in zip(self.groups, inside[0], strict=True):
                pool.share(block)
                blocks.append(block)
                if not self._write_needs_copy(block):
                    pool.write(block, count)  # the slots after them count as empty
            self.num_tokens += count

    def adopt_stored(self, sources: Sequence[Sequence[Source | None]], first: int) -> list[tuple[Stored, int, int]]:
        """Append the logical blocks from `first` on, which must be the end of the table: for each KV group a block of
        the pool to share, something stored that is to be loaded, or None for a HOLE.

        Returns (what is stored, logical block, block to load it into), in the order of logical blocks. The pool must
        have a free block for each.
        """
        pool, loaded = self._pool, []
        for blocks in sources:  # before any other is taken
            for source in blocks[first:]:
                if isinstance(source, int):
                    pool.share(source)
        for index in range(first, len(sources[0])):
            for group, blocks in enumerate(self.groups):
                source = sources[group][index]
                if source is None:
                    blocks.append(HOLE)
                elif isinstance(source, int):
                    blocks.append(source)
                else:
                    blocks.append(pool.allocate(group))
                    pool.write(blocks[-1], pool.block_size)
                    loaded.append((source, index, blocks[-1]))
        self.num_tokens, self._room = len(sources[0]) * pool.block_size, 0
        return loaded

    def hash_full_blocks(self, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Make the blocks findable that `num_computed_tokens` tokens with stored KV have filled since the last call."""
        full = num_computed_tokens // self._pool.block_size
        if self._pool.enable_prefix_caching:
            for index in range(self._num_hashed, full):
                self._set_hash(index, token_ids)
            self._num_hashed = max(self._num_hashed, full)

    def remove_hashes(self) -> None:
        """Make the table's blocks unfindable: sequences with the same prefix compute it anew."""
        for block in self.held_blocks:
            self._pool.remove_hash(block)

    def block_hash(self, index: int, token_ids: Sequence[int]) -> BlockHash:
        """The hash of logical block `index`, which `token_ids` must fill. Each block is hashed once.

        It is that of the first KV group; `group_hash` makes those of others.
        """
        hashes, inputs, size = self._hashes, self._inputs, self._pool.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent, extras = hashes[-1] if hashes else self._root, find_extras(inputs, start, size) if inputs else ()
            hashes.append(hash_block(parent, token_ids[start : start + size], extras))
        return hashes[index]

    def _parent(self, index: int, token_ids: Sequence[int]) -> BlockHash:
        """The hash of the block before logical block `index`."""
        return self.block_hash(index - 1, token_ids) if index else self._root

    def prefix_hash(self, token_ids: Sequence[int], num_tokens: int) -> BlockHash:
        """A name of the first `num_tokens` of `token_ids`: the hash of their last full block, or a hash of that and the
        tokens after it."""
        full, used = divmod(num_tokens, self._pool.block_size)
        parent = self.block_hash(full - 1, token_ids) if full else self._root
        if not used:
            return parent
        start = num_tokens - used
        extras = find_extras(self._inputs, start, used) if self._inputs else ()
        return hash_block(parent, token_ids[start:num_tokens], extras)

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    def _set_hash(self, index: int, token_ids: Sequence[int]) -> None:
        block_hash, start = self.block_hash(index, token_ids), index * self._pool.block_size
        parent = self._parent(index, token_ids)
        keys = self._keys(index, token_ids[start : start + self._pool.block_size])
        for group, blocks in enumerate(self.groups):
            block = blocks[index]
            if block != HOLE:
                own, before = (
                    (group_hash(block_hash, group), group_hash(parent, group)) if group else (block_hash, parent)
                )
                self._pool.set_hash(block, own, before, keys)

    def _keys(self, index: int, token_ids: Sequence[int]) -> Sequence[TokenKey]:
        """The first tokens of logical block `index`, as the pool compares them."""
        if not self._inputs:
            return token_ids
        size = self._pool.block_size
        return token_keys(token_ids, find_extras(self._inputs, index * size, size))

    def _write_needs_copy(self, block: int) -> bool:
        return self._pool.ref_counts[block] > 1 or self._pool.hashes[block] is not None
