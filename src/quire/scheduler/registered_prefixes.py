"""RegisteredPrefixes: prefixes that stay. Their full blocks are held by tables of no sequence, so nothing evicts them.

A prefix is computed by an ordinary request; when that ends, its blocks pass into a table of this file's. The same
blocks can be found under several salts: what an operator registers is no tenant's secret, so all may share it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quire.errors import RequestError
from quire.kv_cache.block_hash import BlockHash, root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import BlockTable


@dataclass(slots=True)
class _Prefix:
    token_ids: list[int]
    """Those of its full blocks."""
    salts: tuple[str, ...]
    """The first is the one under which it is computed."""
    table: BlockTable
    num_new_blocks: int
    """Blocks that no other prefix held when it was asked for."""


class RegisteredPrefixes:
    """Holds the prefixes by id, computed or still being computed, and keeps them within `max_blocks` blocks."""

    def __init__(self, pool: BlockPool, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._pool = pool
        self._held: dict[str, _Prefix] = {}
        self._pending: dict[str, _Prefix] = {}

    def __contains__(self, prefix_id: str) -> bool:
        """Whether the prefix is computed and held."""
        return prefix_id in self._held

    @property
    def num_blocks(self) -> int:
        """Blocks that are held, and that will be when what is pending is computed: no request can have these."""
        return len(self._pool.pinned) + sum(prefix.num_new_blocks for prefix in self._pending.values())

    def check(self, prefix_id: str, token_ids: Sequence[int], salts: Iterable[str]) -> _Prefix:
        """What `reserve` takes. Raises `RequestError` for a prefix that cannot be held."""
        pool = self._pool
        if not pool.enable_prefix_caching:
            raise RequestError("prefixes need the prefix cache; set enable_prefix_caching", param="prefix")
        if prefix_id in self._held or prefix_id in self._pending:
            raise RequestError(f"the prefix id {prefix_id} is in use", param="prefix")
        num_full = len(token_ids) // pool.block_size
        if not num_full:
            raise RequestError(
                f"the prefix has {len(token_ids)} tokens; only full blocks are kept, of {pool.block_size} tokens",
                param="prefix",
            )
        prefix = _Prefix(list(token_ids[: num_full * pool.block_size]), tuple(salts), self._table(next(iter(salts))), 0)
        found = prefix.table.find_prefix([*prefix.token_ids, 0])
        prefix.num_new_blocks = num_full - sum(block in pool.pinned for block in found)
        if self.num_blocks + prefix.num_new_blocks > self.max_blocks:
            raise RequestError(
                f"the prefix takes {prefix.num_new_blocks} more KV blocks of {pool.block_size} tokens; registered "
                f"prefixes hold {self.num_blocks} and may hold {self.max_blocks} of the pool's {pool.num_blocks} "
                "(max_pinned_share)",
                param="prefix",
            )
        return prefix

    def reserve(self, prefix_id: str, prefix: _Prefix) -> None:
        """Count its blocks as taken while it is computed."""
        self._pending[prefix_id] = prefix

    def complete(self, prefix_id: str, computed: BlockTable) -> None:
        """The sequence that computes a pending prefix has ended, and its table is about to be freed."""
        prefix = self._pending.pop(prefix_id, None)
        if prefix is None:
            return
        pool, table = self._pool, prefix.table
        for index in range(len(prefix.token_ids) // pool.block_size):
            # Usually it has that name. It has none where a twin had it first; the twin may be evicted by now.
            pool.set_hash(computed.blocks[index], table.name_of(index, prefix.token_ids))
        table.adopt(table.find_prefix([*prefix.token_ids, 0]))
        pool.pin(table.blocks)
        self._held[prefix_id] = prefix
        self._renew_aliases()

    def cancel(self, prefix_id: str) -> None:
        """Give up a prefix that is still pending, if it is."""
        self._pending.pop(prefix_id, None)

    def remove(self, prefix_id: str) -> None:
        """Let a prefix go; its blocks stay findable until their space is needed. Unknown ids are ignored."""
        prefix = self._held.pop(prefix_id, None)
        if prefix is not None:
            self._pool.unpin(prefix.table.blocks)
            self._renew_aliases()
            prefix.table.free()

    def num_found(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """How many held blocks a sequence can start from, which it need not take from the others'."""
        return sum(block in self._pool.pinned for block in table.find_prefix(token_ids))

    def _renew_aliases(self) -> None:
        aliases: dict[BlockHash, int] = {}
        for prefix in self._held.values():
            for salt in prefix.salts:
                table = self._table(salt)
                names = (table.name_of(index, prefix.token_ids) for index in range(len(prefix.table.blocks)))
                named = zip(names, prefix.table.blocks, strict=True)
                aliases |= {name: block for name, block in named if self._pool.names[block] != name}
        self._pool.set_aliases(aliases)

    def _table(self, salt: str) -> BlockTable:
        return BlockTable(self._pool, root_hash(salt, self._pool.block_size))
