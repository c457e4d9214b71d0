"""BlockTable: one sequence's view of the pool, from logical block to physical block (paper, section 4.2–4.4).

Blocks are taken as tokens come. `fork` shares every block, a partly filled last one too; who first writes to a
shared or named block gets a copy of it, and the (source, destination) pair goes to the runner with the step. A
table that is freed gives all its blocks back, the last first, so that the beginnings of prompts survive longest
in the prefix cache.
"""

from collections.abc import Sequence

from quire.kv_cache.block_hash import BlockExtra, BlockHash, TokenKey, find_extras, hash_block, token_keys
from quire.kv_cache.block_pool import BlockPool, OutOfBlocksError
from quire.request import InputSpan

BlockCopies = list[tuple[int, int]]
"""(source, destination) blocks, in the order in which they must be copied."""


class BlockTable:
    """The blocks that hold the first `num_tokens` tokens of a sequence.

    `root` is the parent hash of its first block; `inputs` are those of the sequence's prompt, which its hashes cover.
    """

    __slots__ = ("_copied_at", "_inputs", "_names", "_num_named", "_pool", "_room", "_root", "blocks", "num_tokens")

    def __init__(self, pool: BlockPool, root: BlockHash = b"", inputs: Sequence[InputSpan] = ()) -> None:
        self.blocks: list[int] = []
        self.num_tokens = 0
        self._pool = pool
        self._root = root
        self._inputs = inputs
        self._names: list[BlockHash] = []
        self._num_named = 0
        self._copied_at = -1
        """How many tokens the table held when its last block was copied last."""
        self._room = 0
        """Tokens that may go into the last block: 0 too where it is shared, or nobody has looked whether it is."""

    def num_appendable(self) -> int:
        """The most tokens `append` could take now."""
        pool, size = self._pool, self._pool.block_size
        used = self.num_tokens % size
        if not used:
            return pool.num_free * size
        if not self._write_needs_copy(self.blocks[-1]):
            return size - used + pool.num_free * size
        return size - used + (pool.num_free - 1) * size if pool.num_free else 0

    @property
    def num_copies_to_come(self) -> int:
        """1 if the next append copies the last block before it writes to it, else 0."""
        return int(self.num_tokens % self._pool.block_size != 0 and self._write_needs_copy(self.blocks[-1]))

    def append(self, num_tokens: int, copies: BlockCopies) -> int:
        """Make room for `num_tokens` ≥ 1 more tokens, which will be written in this step.

        Adds a copy-on-write pair to `copies` if the last block may not be written in place. Returns the index of
        the first entry of `blocks` that changed, or len(blocks) when none did. Raises `OutOfBlocksError`, with
        nothing changed, if the pool has not enough free blocks.
        """
        pool, blocks = self._pool, self.blocks
        if num_tokens <= self._room:
            # Nearly every append: one token into a block that has room and is not shared.
            self._room -= num_tokens
            self.num_tokens += num_tokens
            pool.write(blocks[-1], pool.block_size - self._room)
            return len(blocks)
        size = pool.block_size
        used = self.num_tokens % size
        changed = len(blocks)
        missing = (self.num_tokens + num_tokens + size - 1) // size - changed
        copy_last = used != 0 and self._write_needs_copy(blocks[-1])
        if missing + copy_last > pool.num_free:
            raise OutOfBlocksError(f"{missing + copy_last} blocks are needed and {pool.num_free} are free")
        if copy_last:
            changed -= 1
            shared, blocks[-1] = blocks[-1], pool.copy_on_write(blocks[-1])
            copies.append((shared, blocks[-1]))
            self._copied_at = self.num_tokens
        if used:
            pool.write(blocks[-1], min(size, used + num_tokens))
        self.num_tokens += num_tokens
        for _ in range(missing):
            blocks.append(pool.allocate())
            pool.write(blocks[-1], size)
        if missing > 0:
            pool.write(blocks[-1], (self.num_tokens - 1) % size + 1)
        self._room = -self.num_tokens % size
        return changed

    @property
    def has_room(self) -> bool:
        """Whether a token fits into the last block, which nobody shares."""
        return self._room > 0

    def catch_up(self, num_tokens: int) -> None:
        """The table holds `num_tokens` now: they went into the room that the last block had.

        `BlockPool.count_filled` has counted them as they came.
        """
        if num_tokens > self.num_tokens:
            self._room = max(0, self._room - (num_tokens - self.num_tokens))
            self.num_tokens = num_tokens
            self._pool.set_counted_fill(self.blocks[-1], (num_tokens - 1) % self._pool.block_size + 1)

    def fork(self, num_tokens: int | None = None) -> "BlockTable":
        """A table that shares the blocks of the first `num_tokens` tokens (all by default)."""
        child = BlockTable(self._pool, self._root, self._inputs)
        child.num_tokens = self.num_tokens if num_tokens is None else num_tokens
        child.blocks = self.blocks[: -(-child.num_tokens // self._pool.block_size)]
        full = child.num_tokens // self._pool.block_size
        child._names = self._names[:full]
        child._num_named = min(self._num_named, full)
        for block in child.blocks:
            self._pool.share(block)
        self._room = 0
        return child

    def free(self, stored: Sequence[int] = ()) -> None:
        """Give every block back. The names stay known, so that resuming can look for them.

        `stored` are those of its tokens whose KV the blocks hold: where they end inside a block, whoever begins with
        them can go on there.
        """
        full, used = divmod(len(stored), self._pool.block_size)
        if used and len(stored) > self._copied_at:  # else the copy was ordered, and the step may not come
            parent = self.name_of(full - 1, stored) if full else self._root
            self._pool.leave(self.blocks[full], parent, self._keys(full, stored[-used:]))
        release = self._pool.release
        for block in reversed(self.blocks):
            release(block)
        self.blocks = []
        self.num_tokens = self._room = 0
        self._num_named = 0
        self._copied_at = -1

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens only, and give back the blocks that no longer hold any."""
        size = self._pool.block_size
        num_blocks, used = -(-num_tokens // size), num_tokens % size
        for block in reversed(self.blocks[num_blocks:]):
            self._pool.release(block)
        del self.blocks[num_blocks:]
        self.num_tokens, self._room = num_tokens, 0
        self._num_named = min(self._num_named, num_tokens // size)
        if used and not self._write_needs_copy(self.blocks[-1]):
            self._pool.write(self.blocks[-1], used)

    def find_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Blocks of the pool that already hold the longest findable prefix of `token_ids`, for `adopt`.

        The last token is never covered: its logits are wanted, so at least one token must be computed.
        """
        pool = self._pool
        found: list[int] = []
        if pool.enable_prefix_caching:
            for index in range((len(token_ids) - 1) // pool.block_size):
                block = pool.find(self.name_of(index, token_ids))
                if block is None:
                    break
                found.append(block)
        return found

    def match_partial(self, token_ids: Sequence[int], num_found: int) -> tuple[int, int] | None:
        """Where the findable prefix goes on after `num_found` blocks from `find_prefix`: inside which block, how far.

        Returns a block whose first `count` ≥ 1 tokens, not all of them, are the next of `token_ids`; or None.
        """
        pool = self._pool
        start = num_found * pool.block_size
        wanted = token_ids[start : min(start + pool.block_size, len(token_ids)) - 1]
        if not wanted or not pool.enable_prefix_caching:
            return None
        parent = self._names[num_found - 1] if num_found else self._root
        return pool.children.longest(parent, self._keys(num_found, wanted))

    def adopt(self, found: list[int], inside: tuple[int, int] | None = None) -> None:
        """Go on with blocks from `find_prefix`, in a table whose last block is full or that has none.

        And with the first tokens of the block that `match_partial` gave: the next append copies it, as after a fork, or
        goes on in it where a sequence left it partly filled.
        """
        for block in found:
            self._pool.share(block)
        self.blocks += found
        self.num_tokens += len(found) * self._pool.block_size
        self._num_named = len(self.blocks)
        if inside is not None:
            block, count = inside
            self._pool.share(block)
            self.blocks.append(block)
            self.num_tokens += count
            if not self._write_needs_copy(block):
                self._pool.write(block, count)  # what lies behind counts as empty

    def hash_full_blocks(self, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Name the blocks that `num_computed_tokens` tokens with stored KV have filled since the last call."""
        full = num_computed_tokens // self._pool.block_size
        if self._pool.enable_prefix_caching:
            for index in range(self._num_named, full):
                self._name(index, token_ids)
            self._num_named = max(self._num_named, full)

    def forget_hashes(self) -> None:
        """Make the table's blocks unfindable: whoever has the same prefix computes it anew."""
        for block in self.blocks:
            self._pool.forget_name(block)

    def name_of(self, index: int, token_ids: Sequence[int]) -> BlockHash:
        """The name of logical block `index`, which `token_ids` must fill; each is hashed once."""
        names = self._names
        size = self._pool.block_size
        while len(names) <= index:
            start = len(names) * size
            parent, extras = names[-1] if names else self._root, self._extras(len(names))
            names.append(hash_block(parent, token_ids[start : start + size], extras))
        return names[index]

    def _name(self, index: int, token_ids: Sequence[int]) -> None:
        name, start = self.name_of(index, token_ids), index * self._pool.block_size
        parent = self._names[index - 1] if index else self._root
        keys = self._keys(index, token_ids[start : start + self._pool.block_size])
        self._pool.set_hash(self.blocks[index], name, parent, keys)

    def _extras(self, index: int) -> Sequence[BlockExtra]:
        """The inputs that cover tokens of logical block `index`."""
        size = self._pool.block_size
        return find_extras(self._inputs, index * size, size) if self._inputs else ()

    def _keys(self, index: int, token_ids: Sequence[int]) -> Sequence[TokenKey]:
        """The first tokens of logical block `index`, as the pool compares them."""
        return token_keys(token_ids, self._extras(index))

    def _write_needs_copy(self, block: int) -> bool:
        return self._pool.ref_counts[block] > 1 or self._pool.names[block] is not None
