"""PartialBlockIndex: which blocks follow which, with their tokens, to find prefixes that end inside a block.

A block hash finds a block only if all its tokens are wanted. Where two prompts part inside a block, the tokens before
that place still have the same KV. A sequence may share the block up to there; its first write copies the block, as
after a fork. A block that a sequence left partly filled has no hash and can only be found here.
"""

from collections.abc import Iterator, Sequence

from quire.kv_cache.block_hash import BlockHash, TokenKey

MAX_CHILDREN = 8
"""Blocks kept per parent, the latest. It bounds the search when a sequence starts, however many prompts part there."""


class PartialBlockIndex:
    """At most one entry per block: blocks with a hash, and free blocks that were left partly filled. Kept by the pool.

    Tokens are `TokenKey`s, so blocks of different images do not match where their placeholder tokens are equal.
    """

    def __init__(self) -> None:
        self._children: dict[BlockHash, list[int]] = {}
        self._entries: dict[int, tuple[BlockHash, Sequence[TokenKey]]] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def tokens_of(self, block: int) -> Sequence[TokenKey]:
        """The tokens of a block's entry; empty without one."""
        entry = self._entries.get(block)
        return () if entry is None else entry[1]

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, block: int, parent: BlockHash, tokens: Sequence[TokenKey]) -> int | None:
        """Add a block that follows the block with the hash `parent`.

        If the parent has too many entries, removes the oldest one and returns its block.
        """
        siblings, removed = self._children.setdefault(parent, []), None
        if len(siblings) == MAX_CHILDREN:
            removed = siblings.pop(0)
            del self._entries[removed]
        siblings.append(block)
        self._entries[block] = parent, tokens
        return removed

    def remove(self, block: int) -> None:
        """Remove a block's entry, if it has one."""
        entry = self._entries.pop(block, None)
        if entry is not None:
            siblings = self._children[entry[0]]
            siblings.remove(block)
            if not siblings:
                del self._children[entry[0]]

    def longest(self, parent: BlockHash, tokens: Sequence[TokenKey]) -> tuple[int, int] | None:
        """The child of `parent` with the longest common beginning with `tokens`, and that length (≥ 1).

        Among equals the latest.
        """
        best, longest = None, 0
        for block in reversed(self._children.get(parent, ())):
            length = 0
            for wanted, held in zip(tokens, self._entries[block][1], strict=False):
                if wanted != held:
                    break
                length += 1
            if length > longest:
                best, longest = block, length
        return None if best is None else (best, longest)
