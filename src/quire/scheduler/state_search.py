"""StateSearch: the longest beginning of a sequence that has both KV and a recurrent state, in the pool and in tiers.

In the pool a beginning may end anywhere. Tiers hold only full blocks and the states after them.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from quire.kv_cache.block_hash import BlockHash, state_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.states import NO_STATE, FoundState
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.found import Found
from quire.scheduler.recurrent_states import RecurrentStates
from quire.scheduler.sequence import Sequence

AwaitedBlock = tuple[int, BlockHash]
"""(logical block, hash)."""


class StateSearch:
    """Owned by `PrefixLookup`. It changes nothing."""

    def __init__(self, pool: BlockPool, states: RecurrentStates, offload: BlockOffload | None) -> None:
        self._pool = pool
        self._states = states
        self._offload = offload

    def find(self, sequence: Sequence, token_ids: list[int], *, whole_blocks: bool = False) -> Found | AwaitedBlock:
        """The longest beginning of `token_ids`, without the last one, whose KV and state can be had.

        If another sequence is loading its next block, or a state that would serve, that block.
        """
        found = self.find_in_pool(sequence, token_ids, whole_blocks=whole_blocks)
        if self._offload is None:
            return found
        longer = self._find_in_tiers(sequence, token_ids, found, self._offload)
        if not isinstance(longer, Found):
            return longer
        num_found = 0 if longer.state is None else longer.state.num_tokens
        index = num_found // self._pool.block_size
        if index < (len(token_ids) - 1) // self._pool.block_size:
            block_hash = sequence.table.block_hash(index, token_ids)
            if self._offload.is_in_flight(block_hash):
                return index, block_hash
        return longer

    def find_in_pool(self, sequence: Sequence, token_ids: list[int], *, whole_blocks: bool = False) -> Found:
        """The same without the tiers."""
        table, size, end = sequence.table, self._pool.block_size, len(token_ids) - 1
        num_known = -1
        while True:
            # A window group needs other blocks for a shorter beginning, so each end is looked up anew.
            tokens = token_ids[: end + 1]
            blocks = table.find_prefix(tokens)
            inside = None if whole_blocks else table.match_partial(tokens, len(blocks[0]))
            num_found = len(blocks[0]) * size + (0 if inside is None else inside[1])
            num_known = max(num_known, num_found)
            state = self._states.find(table, token_ids, num_found)
            if state is None:
                return Found([[] for _ in self._pool.windows], num_known_tokens=num_known)
            if state.num_tokens == num_found:
                return Found(blocks, None, inside, state, num_known)
            end = state.num_tokens // size * size if whole_blocks else state.num_tokens

    def _find_in_tiers(
        self, sequence: Sequence, token_ids: list[int], found: Found, offload: BlockOffload
    ) -> Found | AwaitedBlock:
        """`found`, or a longer beginning with blocks or a state of tiers, if loading it pays."""
        table, size = sequence.table, self._pool.block_size
        least = 0 if found.state is None else found.state.num_tokens
        most = (len(token_ids) - 1) // size
        hashes = [table.block_hash(index, token_ids) for index in range(most)]
        while True:
            blocks = table.find_prefix(token_ids[: most * size + 1])
            stored = offload.find_longest(sequence, token_ids, blocks, most)
            num_blocks = self._last_state(hashes[: stored.num_blocks], least // size, offload)
            if num_blocks is None:
                return found
            if num_blocks == stored.num_blocks:
                break
            most = num_blocks
        name, slot = hashes[num_blocks - 1], self._states.pool.slot_of(hashes[num_blocks - 1])
        if slot == NO_STATE:
            state = offload.find_state(name)
            if state is None:  # another sequence loads it
                return num_blocks - 1, name
            stored = replace(stored, state=state)
        if not stored or not offload.pays(stored, blocks, num_blocks * size - least):
            return found
        return Found(blocks, stored, None, FoundState(num_blocks * size, slot), found.num_known_tokens)

    def _last_state(self, hashes: SequenceOf[BlockHash], least: int, offload: BlockOffload) -> int | None:
        """The most blocks after which the pool or a tier has the state, if they are more than `least`."""
        for num_blocks in range(len(hashes), least, -1):
            name = hashes[num_blocks - 1]
            if self._states.pool.holds(name) or offload.is_stored(state_hash(name)):
                return num_blocks
        return None
