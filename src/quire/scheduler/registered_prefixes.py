"""RegisteredPrefixes: prefixes that are kept on request. Tables of no sequence hold their full blocks, so nothing
evicts them.

An ordinary request computes a prefix. When it ends, a table of this class takes over its blocks and pins them. The same
blocks can be found under several salts: what an operator registers is no tenant's secret, so all may share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.errors import RequestError
from quire.kv_cache.block_hash import BlockHash, group_hash, root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import HOLE, BlockTable
from quire.kv_cache.states import StatePool
from quire.request import Request


@dataclass(slots=True)
class _Prefix:
    request: Request
    """The request that computes it, cut to full blocks."""
    salts: tuple[str, ...]
    """The first one is the request's."""
    table: BlockTable
    num_new_blocks: int
    """Blocks that no other prefix held when it was registered."""

    @property
    def token_ids(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def name(self) -> BlockHash:
        """The hash of its last block."""
        return self.table.prefix_hash(self.token_ids, len(self.token_ids))


class RegisteredPrefixes:
    """All registered prefixes by id, computed or pending, within `max_blocks` blocks."""

    def __init__(self, pool: BlockPool, max_blocks: int, states: StatePool | None = None) -> None:
        self.max_blocks = max_blocks
        self._states = states
        self._pool = pool
        self._held: dict[str, _Prefix] = {}
        self._pending: dict[str, _Prefix] = {}

    def __contains__(self, prefix_id: str) -> bool:
        """Whether the prefix is computed and held."""
        return prefix_id in self._held

    @property
    def num_blocks(self) -> int:
        """Blocks that no request can have: those that are pinned, and those that pending prefixes will pin."""
        return len(self._pool.pinned) + sum(prefix.num_new_blocks for prefix in self._pending.values())

    def check(self, request: Request, salts: Sequence[str]) -> _Prefix:
        """What `reserve` takes, for the prompt of a request. Raises `RequestError` if the prefix cannot be held."""
        pool, prefix_id = self._pool, request.request_id
        if not pool.enable_prefix_caching:
            raise RequestError("prefixes need the prefix cache; set enable_prefix_caching", param="prefix")
        if prefix_id in self._held or prefix_id in self._pending:
            raise RequestError(f"the prefix id {prefix_id} is in use", param="prefix")
        num_tokens, size = len(request.prompt_token_ids), pool.block_size
        num_full = num_tokens // size
        for span in reversed(request.inputs):  # an input is kept whole or not at all
            if span.offset < num_full * size < span.offset + span.length:
                num_full = span.offset // size
        if not num_full:
            raise RequestError(
                f"the prefix has {num_tokens} tokens; only full blocks are kept, of {size} tokens", param="prefix"
            )
        request = replace(
            request,
            prompt_token_ids=request.prompt_token_ids[: num_full * size],
            inputs=tuple(span for span in request.inputs if span.offset < num_full * size),
        )
        prefix = _Prefix(request, tuple(salts), self._table(request, salts[0]), 0)
        prefix.num_new_blocks = pool.blocks_after(num_full * size) - self.num_found(
            prefix.table, [*prefix.token_ids, 0]
        )
        if self.num_blocks + prefix.num_new_blocks > self.max_blocks:
            raise RequestError(
                f"the prefix takes {prefix.num_new_blocks} more KV blocks of {size} tokens; registered "
                f"prefixes hold {self.num_blocks} and may hold {self.max_blocks} of the pool's {pool.num_blocks} "
                "(max_pinned_share)",
                param="prefix",
            )
        states, held = self._states, len(self._held) + len(self._pending)
        if states is not None and held >= states.max_snapshots // 2:
            raise RequestError(
                f"a registered prefix takes a slot of recurrent state; {held} prefixes are registered, and half of "
                f"the {states.max_snapshots} slots for snapshots may be taken by them",
                param="prefix",
            )
        return prefix

    def reserve(self, prefix: _Prefix) -> None:
        """Count a prefix's blocks as taken while it is computed."""
        self._pending[prefix.request.request_id] = prefix

    def complete(self, prefix_id: str, computed: BlockTable) -> None:
        """The sequence that computes a pending prefix has ended, and its table is about to be freed."""
        prefix = self._pending.pop(prefix_id, None)
        if prefix is None:
            return
        pool, table = self._pool, prefix.table
        for index in range(len(prefix.token_ids) // pool.block_size):
            # A block usually has its hash. It has none if a twin had the hash first, and the twin may be evicted now.
            for group, blocks in enumerate(computed.groups):
                if blocks[index] != HOLE:
                    pool.set_hash(blocks[index], group_hash(table.block_hash(index, prefix.token_ids), group))
        table.adopt(table.find_prefix([*prefix.token_ids, 0]))
        pool.pin(table.held_blocks)
        if self._states is not None:
            self._states.pin(prefix.name)  # of the slot that its sequence is about to hand over
        self._held[prefix_id] = prefix
        self._renew_aliases()

    def cancel(self, prefix_id: str) -> None:
        """Remove a prefix that is still pending, if it is."""
        self._pending.pop(prefix_id, None)

    def remove(self, prefix_id: str) -> None:
        """Unpin a prefix; its blocks can be found until they are evicted. Unknown ids are ignored."""
        prefix = self._held.pop(prefix_id, None)
        if prefix is not None:
            self._pool.unpin(prefix.table.held_blocks)
            if self._states is not None:
                self._states.unpin(prefix.name)
            self._renew_aliases()
            prefix.table.free()

    def num_found(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """How many pinned blocks a sequence can start from instead of taking free ones."""
        if self._states is not None:
            return 0  # a sequence that begins where no snapshot is computes blocks of its own
        return sum(block in self._pool.pinned for blocks in table.find_prefix(token_ids) for block in blocks)

    def _renew_aliases(self) -> None:
        aliases: dict[BlockHash, int] = {}
        state_aliases: dict[BlockHash, BlockHash] = {}
        for prefix in self._held.values():
            for salt in prefix.salts:
                table = self._table(prefix.request, salt)
                for group, blocks in enumerate(prefix.table.groups):
                    hashes = (group_hash(table.block_hash(i, prefix.token_ids), group) for i in range(len(blocks)))
                    pairs = [pair for pair in zip(hashes, blocks, strict=True) if pair[1] != HOLE]
                    aliases |= {found: block for found, block in pairs if self._pool.hashes[block] != found}
                state_aliases[table.prefix_hash(prefix.token_ids, len(prefix.token_ids))] = prefix.name
        self._pool.set_aliases(aliases)
        if self._states is not None:
            self._states.set_aliases(state_aliases)

    def _table(self, request: Request, salt: str) -> BlockTable:
        """An empty table for the prompt of a request, under another salt."""
        return BlockTable(self._pool, root_hash(salt, self._pool.block_size, request.adapter), request.inputs)
