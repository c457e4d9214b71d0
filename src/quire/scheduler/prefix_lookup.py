"""PrefixLookup: which tokens of a sequence need not be computed, because the pool or a tier has them or soon will.

It changes no table: its callers adopt what it finds. It counts what was found, and why the rest was not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from quire.kv_cache.block_hash import BlockHash, group_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.prefix_history import PrefixHistory
from quire.outputs import PrefixMiss
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.found import Found
from quire.scheduler.recurrent_states import RecurrentStates
from quire.scheduler.sequence import Sequence, SequenceGroup
from quire.scheduler.state_search import StateSearch


@dataclass(slots=True)
class PrefixCounts:
    """How much was found since the start."""

    num_hits: int = 0
    """Prompt tokens that were found."""
    hits: dict[str, int] = field(default_factory=dict)
    """The same by where their KV was: device, host, disk."""
    misses: dict[str, int] = field(default_factory=dict)
    """Reasons of `PrefixMiss` → requests."""


class PrefixLookup:
    """Owned by the scheduler. It reads the pool, which reports evictions to it."""

    def __init__(
        self,
        pool: BlockPool,
        offload: BlockOffload | None,
        clock: Callable[[], float],
        states: RecurrentStates | None = None,
    ) -> None:
        self.counts = PrefixCounts()
        self._pool = pool
        self._offload = offload
        self._states = states
        self._search = None if states is None else StateSearch(pool, states, offload)
        self._history = PrefixHistory(pool.block_size, clock, pool.num_blocks)
        pool.eviction_listeners.append(self._note_eviction)

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, group: SequenceGroup, prefilling: list[Sequence], loading: list[Sequence]) -> Found | None:
        """What a waiting group can start from; None while another sequence computes or loads its next block."""
        if not self._pool.enable_prefix_caching or group.lacks_prompt_logprobs:
            return Found([[] for _ in self._pool.windows])
        if group.awaited is not None and self._is_in_flight(group.awaited, prefilling, loading):
            return None
        if self._states is not None and self._search is not None:
            return self._find_with_state(group, self._states, self._search, [*prefilling, *loading])
        leader, stored = group.leader, None
        # Where others get their first token with the leader, it computes the last token of the prompt.
        alone = len(group.sequences) == 1 or leader.num_output_tokens > 0
        token_ids = leader.token_ids if alone else group.request.prompt_token_ids
        blocks = leader.table.find_prefix(token_ids)
        num_found = len(blocks[0])
        inside = leader.table.match_partial(token_ids, num_found)
        group.awaited = self._next_full_block(leader, token_ids, num_found)
        if self._offload is not None:
            stored = self._offload.find(leader, token_ids, blocks)
        if group.awaited is not None and self._is_in_flight(group.awaited, prefilling, loading):
            return None
        return Found(blocks, stored, inside)

    def _find_with_state(
        self, group: SequenceGroup, states: RecurrentStates, search: StateSearch, others: list[Sequence]
    ) -> Found | None:
        """What a group can start from: the longest beginning with both its KV and a snapshot of its state."""
        leader = group.leader
        # Several sequences fork where the prompt ends, so their leader always passes there.
        token_ids = leader.token_ids if len(group.sequences) == 1 else group.request.prompt_token_ids
        found = search.find(leader, token_ids)
        if not isinstance(found, Found):
            group.awaited = found
            return None
        num_found = 0 if found.state is None else found.state.num_tokens
        group.awaited = states.await_common_prefix(leader, token_ids, num_found, others)
        return None if group.awaited is not None else found

    def find_whole_blocks(self, group: SequenceGroup, found: Found) -> Found:
        """What a group can start from instead of `found` if it cannot begin inside a block."""
        if self._search is None:
            return found._replace(inside=None)
        leader = group.leader
        token_ids = leader.token_ids if len(group.sequences) == 1 else group.request.prompt_token_ids
        return self._search.find_in_pool(leader, token_ids, whole_blocks=True)

    def has_output(self, sequence: Sequence, prefilling: list[Sequence]) -> bool:
        """Whether a resumed sequence can start from more than the prompt that it shares with its leader.

        With a recurrent state it always goes on from where the prompt ends.
        """
        if self._states is not None:
            return False
        found = self.find_output(sequence, prefilling)
        num_shared = sequence.group.num_prompt_tokens // self._pool.block_size
        return found is None or found.num_blocks > num_shared or bool(found.stored)

    def find_output(self, sequence: Sequence, prefilling: list[Sequence]) -> Found | None:
        """What a resumed sequence can start from: the full blocks of the prompt that it shares with its leader, and
        cached ones of its output. None while another sequence computes or loads the next block."""
        if self._search is not None:
            if not self._pool.enable_prefix_caching:
                return Found([[] for _ in self._pool.windows])
            alone = len(sequence.group.sequences) == 1
            token_ids = sequence.token_ids if alone else sequence.group.request.prompt_token_ids
            hit = self._search.find(sequence, token_ids, whole_blocks=True)
            return hit if isinstance(hit, Found) else None
        group, loading = sequence.group, list(self._offload.waiting) if self._offload is not None else []
        if group.leader in loading and sequence is not group.leader:
            return None
        blocks = sequence.table.find_prefix(sequence.token_ids)
        if sequence is not group.leader:
            blocks = group.leader.table.share_prefix(blocks, group.num_prompt_tokens // self._pool.block_size)
        if not self._pool.enable_prefix_caching:
            return Found(blocks)
        first = len(blocks[0])
        awaited = self._next_full_block(sequence, sequence.token_ids, first)
        if awaited is not None and self._is_in_flight(awaited, prefilling, loading):
            return None
        offload = self._offload
        return Found(blocks, None if offload is None else offload.find(sequence, sequence.token_ids, blocks))

    def _next_full_block(self, sequence: Sequence, token_ids: list[int], index: int) -> tuple[int, BlockHash] | None:
        """Logical block `index` of a sequence and its hash, if `token_ids` could have it from the cache."""
        if index >= (len(token_ids) - 1) // self._pool.block_size:
            return None
        return index, sequence.table.block_hash(index, token_ids)

    def _is_in_flight(self, block: tuple[int, BlockHash], prefilling: list[Sequence], loading: list[Sequence]) -> bool:
        """Whether a sequence loads a block, or computes it in this step or a later one."""
        (index, block_hash), block_size = block, self._pool.block_size
        if self._offload is not None and self._offload.is_in_flight(block_hash):
            return True
        return any(
            other.num_computed_tokens // block_size <= index < len(other.token_ids) // block_size
            and other.table.block_hash(index, other.token_ids) == block_hash
            for other in ([*prefilling, *loading] if loading else prefilling)
        )

    # -- counting -----------------------------------------------------------------------------------------------------

    def count_hits(self, sequence: Sequence, hits: dict[str, int]) -> None:
        """Count the prompt tokens found, by where their KV was, if the group starts here and does not resume."""
        group = sequence.group
        if group.num_preemptions or sequence is not group.leader:
            return
        for origin, found in hits.items():
            # After a restart of the engine, tokens that were output before may be found, too.
            num_tokens = min(found, group.num_prompt_tokens - group.num_cached_tokens)
            if num_tokens > 0:
                group.num_cached_tokens += num_tokens
                self.counts.num_hits += num_tokens
                for counts in (group.cached_tokens, self.counts.hits):
                    counts[origin] = counts.get(origin, 0) + num_tokens

    def explain(self, group: SequenceGroup) -> None:
        """Note why the first block that a group must compute was not found."""
        leader, request = group.leader, group.request
        prompt, block_size = request.prompt_token_ids, self._pool.block_size
        first = leader.num_computed_tokens // block_size
        if first >= (len(prompt) - 1) // block_size or not self._pool.enable_prefix_caching:
            return
        block_hash = leader.table.block_hash(first, prompt)
        if self._states is not None and self._pool.find(block_hash) is not None:
            miss = PrefixMiss(first, "state", None)
        else:
            miss = self._history.explain(prompt, first, block_hash, adapter=request.adapter, inputs=request.inputs)
            if self._pool.has_windows and miss.reason in ("differs", "new"):
                miss = self._explain_window(leader, prompt, miss)
        group.miss = miss
        self.counts.misses[miss.reason] = self.counts.misses.get(miss.reason, 0) + 1

    def _explain_window(self, leader: Sequence, prompt: list[int], miss: PrefixMiss) -> PrefixMiss:
        """The miss, if a window group has lost a block that the next logical block needs."""
        pool, first = self._pool, miss.block
        for group, window in enumerate(pool.windows):
            for index in range(pool.first_kept(group, (first + 1) * pool.block_size), first + 1):
                block_hash = group_hash(leader.table.block_hash(index, prompt), group)
                if pool.find(block_hash) is not None:
                    continue
                seconds = self._history.seconds_since_eviction(block_hash)
                if seconds is None and group == 0:  # no group has it
                    return miss._replace(window=window)
                return PrefixMiss(first, "evicted", seconds, window)
        return miss

    def _note_eviction(self, block: int, block_hash: BlockHash) -> None:
        self._history.note_eviction(block_hash)
