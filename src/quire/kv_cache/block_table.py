"""BlockTable: one sequence's view of the pool, from logical block to physical block (paper, section 4.2–4.4).

Blocks are taken as tokens come. `fork` shares every block, also a partly filled last one. The first write to a block
that is shared or has a hash gets a copy of it (copy-on-write); the (source, destination) pair goes to the runner with
the step. `free` gives the last block back first, so that the beginnings of prompts survive longest in the prefix cache.
"""

from collections.abc import Sequence

from quire.kv_cache.block_hash import BlockHash, TokenKey, find_extras, hash_block, token_keys
from quire.kv_cache.block_pool import BlockPool, OutOfBlocksError
from quire.request import InputSpan

BlockCopies = list[tuple[int, int]]
"""(source, destination) blocks, in the order in which they must be copied."""


class BlockTable:
    """The blocks that hold the first `num_tokens` tokens of a sequence.

    `root` is the parent hash of its first block; `inputs` are those of the sequence's prompt, which its hashes cover.
    """

    __slots__ = ("_copied_at", "_hashes", "_inputs", "_num_hashed", "_pool", "_room", "_root", "blocks", "num_tokens")

    def __init__(self, pool: BlockPool, root: BlockHash = b"", inputs: Sequence[InputSpan] = ()) -> None:
        self.blocks: list[int] = []
        self.num_tokens = 0
        self._pool = pool
        self._root = root
        self._inputs = inputs
        self._hashes: list[BlockHash] = []
        self._num_hashed = 0
        self._copied_at = -1
        """Number of tokens in the table when a block was copied last."""
        self._room = 0
        """Tokens that surely fit into the last block without a copy. 0 also means: not known."""

    def num_appendable(self) -> int:
        """The most tokens that `append` could take now."""
        pool, size = self._pool, self._pool.block_size
        used = self.num_tokens % size
        if not used:
            return pool.num_free * size
        if not self._write_needs_copy(self.blocks[-1]):
            return size - used + pool.num_free * size
        return size - used + (pool.num_free - 1) * size if pool.num_free else 0

    @property
    def num_copies_to_come(self) -> int:
        """1 if the next `append` copies the last block before it writes to it, else 0."""
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
        """Whether the last block has a free slot and is not shared."""
        return self._room > 0

    def catch_up(self, num_tokens: int) -> None:
        """The table now holds `num_tokens`: the new tokens went into free slots of its last block.

        `BlockPool.count_filled` counted them as they came.
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
        child._hashes = self._hashes[:full]
        child._num_hashed = min(self._num_hashed, full)
        for block in child.blocks:
            self._pool.share(block)
        self._room = 0
        return child

    def free(self, stored: Sequence[int] = ()) -> None:
        """Give every block back. The hashes stay known, so that resuming can look for them.

        `stored` are the tokens whose KV is in the blocks. If they end inside a block, that block is retained for
        sequences that begin with the same tokens.
        """
        full, used = divmod(len(stored), self._pool.block_size)
        if used and len(stored) > self._copied_at:  # else the copy is planned, and the step may be rolled back
            parent = self.block_hash(full - 1, stored) if full else self._root
            self._pool.retain_partial(self.blocks[full], parent, self._keys(full, stored[-used:]))
        release = self._pool.release
        for block in reversed(self.blocks):
            release(block)
        self.blocks = []
        self.num_tokens = self._room = 0
        self._num_hashed = 0
        self._copied_at = -1

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens only, and give back the blocks that no longer hold any."""
        size = self._pool.block_size
        num_blocks, used = -(-num_tokens // size), num_tokens % size
        for block in reversed(self.blocks[num_blocks:]):
            self._pool.release(block)
        del self.blocks[num_blocks:]
        self.num_tokens, self._room = num_tokens, 0
        self._num_hashed = min(self._num_hashed, num_tokens // size)
        if used and not self._write_needs_copy(self.blocks[-1]):
            self._pool.write(self.blocks[-1], used)

    def find_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Blocks of the pool that already hold the longest findable prefix of `token_ids`, for `adopt`.

        The last token is never covered: its logits are needed, so at least one token must be computed.
        """
        pool = self._pool
        found: list[int] = []
        if pool.enable_prefix_caching:
            for index in range((len(token_ids) - 1) // pool.block_size):
                block = pool.find(self.block_hash(index, token_ids))
                if block is None:
                    break
                found.append(block)
        return found

    def match_partial(self, token_ids: Sequence[int], num_found: int) -> tuple[int, int] | None:
        """How far the findable prefix goes on inside a block, after `num_found` blocks from `find_prefix`.

        Returns (block, count): its first `count` ≥ 1 tokens, not all of them, are the next of `token_ids`. Or None.
        """
        pool = self._pool
        start = num_found * pool.block_size
        wanted = token_ids[start : min(start + pool.block_size, len(token_ids)) - 1]
        if not wanted or not pool.enable_prefix_caching:
            return None
        parent = self._hashes[num_found - 1] if num_found else self._root
        return pool.children.longest(parent, self._keys(num_found, wanted))

    def adopt(self, found: list[int], inside: tuple[int, int] | None = None) -> None:
        """Append blocks from `find_prefix` to a table that is empty or whose last block is full.

        `inside` is what `match_partial` found: a block and how many of its tokens to use. The next `append` copies that
        block, as after a fork, or goes on in it if it was retained partly filled.
        """
        for block in found:
            self._pool.share(block)
        self.blocks += found
        self.num_tokens += len(found) * self._pool.block_size
        self._num_hashed = len(self.blocks)
        if inside is not None:
            block, count = inside
            self._pool.share(block)
            self.blocks.append(block)
            self.num_tokens += count
            if not self._write_needs_copy(block):
                self._pool.write(block, count)  # the slots after them count as empty

    def hash_full_blocks(self, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Make the blocks findable that `num_computed_tokens` tokens with stored KV have filled since the last call."""
        full = num_computed_tokens // self._pool.block_size
        if self._pool.enable_prefix_caching:
            for index in range(self._num_hashed, full):
                self._set_hash(index, token_ids)
            self._num_hashed = max(self._num_hashed, full)

    def remove_hashes(self) -> None:
        """Make the table's blocks unfindable: sequences with the same prefix compute it anew."""
        for block in self.blocks:
            self._pool.remove_hash(block)

    def block_hash(self, index: int, token_ids: Sequence[int]) -> BlockHash:
        """The hash of logical block `index`, which `token_ids` must fill. Each block is hashed once."""
        hashes, inputs, size = self._hashes, self._inputs, self._pool.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent, extras = hashes[-1] if hashes else self._root, find_extras(inputs, start, size) if inputs else ()
            hashes.append(hash_block(parent, token_ids[start : start + size], extras))
        return hashes[index]

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
        parent = self._hashes[index - 1] if index else self._root
        keys = self._keys(index, token_ids[start : start + self._pool.block_size])
        self._pool.set_hash(self.blocks[index], block_hash, parent, keys)

    def _keys(self, index: int, token_ids: Sequence[int]) -> Sequence[TokenKey]:
        """The first tokens of logical block `index`, as the pool compares them."""
        if not self._inputs:
            return token_ids
        size = self._pool.block_size
        return token_keys(token_ids, find_extras(self._inputs, index * size, size))

    def _write_needs_copy(self, block: int) -> bool:
        return self._pool.ref_counts[block] > 1 or self._pool.hashes[block] is not None
