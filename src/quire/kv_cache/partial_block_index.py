"""PartialBlockIndex: which blocks follow which, with their tokens, to find prefixes that end inside a block.

A name finds a block whose tokens are all wanted. Where two prompts part inside a block, its first tokens still have the
same KV, and a sequence may share the block up to there; its first write copies it, as after a fork. A block that a
sequence left partly filled has no name, and is found here alone.
"""

from collections.abc import Iterator, Sequence

from quire.kv_cache.block_hash import BlockHash

MAX_CHILDREN = 8
"""Blocks remembered per parent, the latest: what is looked through when a sequence starts, however many part there."""


class PartialBlockIndex:
    """At most one entry per block: named ones, and those left partly filled while they are free. The pool keeps it."""

    def __init__(self) -> None:
        self._children: dict[BlockHash, list[int]] = {}
        self._entries: dict[int, tuple[BlockHash, Sequence[int]]] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, block: int, parent: BlockHash, token_ids: Sequence[int]) -> int | None:
        """Remember a block that follows the one named `parent`; returns the oldest of too many, which is forgotten."""
        siblings, forgotten = self._children.setdefault(parent, []), None
        if len(siblings) == MAX_CHILDREN:
            forgotten = siblings.pop(0)
            del self._entries[forgotten]
        siblings.append(block)
        self._entries[block] = parent, token_ids
        return forgotten

    def remove(self, block: int) -> None:
        """Forget a block, if it is remembered."""
        entry = self._entries.pop(block, None)
        if entry is not None:
            siblings = self._children[entry[0]]
            siblings.remove(block)
            if not siblings:
                del self._children[entry[0]]

    def longest(self, parent: BlockHash, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """The child of `parent` that begins with the most of `token_ids`, the latest of equals, and how many (≥ 1)."""
        best, longest = None, 0
        for block in reversed(self._children.get(parent, ())):
            length = 0
            for wanted, held in zip(token_ids, self._entries[block][1], strict=False):
                if wanted != held:
                    break
                length += 1
            if length > longest:
                best, longest = block, length
        return None if best is None else (best, longest)
