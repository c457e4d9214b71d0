"""PrefixLookup: what of a sequence need not be computed, because the pool or a tier below holds it or soon will.

It changes no table: whoever asks adopts what is found. It keeps the counts of what was found, and why the rest was not.
"""

from collections.abc import Callable
from typing import NamedTuple

from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.prefix_history import PrefixHistory
from quire.outputs import EngineStats
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.sequence import Sequence, SequenceGroup


class Found(NamedTuple):
    """What a group that waits can start from."""

    blocks: list[int]
    """Full blocks of the pool."""
    stored: list[tuple[str, BlockHash]]
    """(tier, name) of the blocks after those."""
    inside: tuple[int, int] | None
    """The block after those of which only the beginning is shared, as `BlockTable.match_partial` has it."""


class PrefixLookup:
    """Owned by the scheduler; reads the pool, and hears of its evictions."""

    def __init__(
        self, pool: BlockPool, transfers: BlockOffload | None, stats: EngineStats, clock: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._transfers = transfers
        self._stats = stats
        self._history = PrefixHistory(pool.block_size, clock)
        self._save_evicted, pool.on_evict = pool.on_evict, self._note_eviction

    # -- what is found ------------------------------------------------------------------------------------------------

    def find(self, group: SequenceGroup, behind: list[Sequence], loading: list[Sequence]) -> Found | None:
        """What a waiting group can start from; None while somebody computes or loads its next block just now."""
        if not self._pool.enable_prefix_caching or group.lacks_prompt_logprobs:
            return Found([], [], None)
        if group.awaited is not None and self._is_on_its_way(group.awaited, behind, loading):
            return None
        leader, stored = group.leader, list[tuple[str, BlockHash]]()
        # Where others get their first token with the leader, it computes the last token of the prompt.
        alone = len(group.sequences) == 1 or leader.num_output_tokens > 0
        token_ids = leader.token_ids if alone else group.request.prompt_token_ids
        blocks = leader.table.find_prefix(token_ids)
        inside = leader.table.match_partial(token_ids, len(blocks))
        group.awaited = self._next_full_block(leader, token_ids, len(blocks))
        if self._transfers is not None:
            stored = self._transfers.find(leader, token_ids, len(blocks))
        if group.awaited is not None and self._is_on_its_way(group.awaited, behind, loading):
            return None
        return Found(blocks, stored, inside)

    def find_output(
        self, sequence: Sequence, behind: list[Sequence]
    ) -> tuple[list[int], list[tuple[str, BlockHash]]] | None:
        """What is found of a resumed sequence, past the full blocks of the prompt where it shares those of its leader.

        First blocks of the pool, then (tier, name) below it. None while somebody computes or loads the next block.
        """
        if not self._pool.enable_prefix_caching:
            return [], []
        group, loading = sequence.group, list(self._transfers.waiting) if self._transfers is not None else []
        if group.leader in loading and sequence is not group.leader:
            return None
        num_shared = 0 if sequence is group.leader else group.num_prompt_tokens // self._pool.block_size
        found = sequence.table.find_prefix(sequence.token_ids)[num_shared:]
        first = num_shared + len(found)
        awaited = self._next_full_block(sequence, sequence.token_ids, first)
        if awaited is not None and self._is_on_its_way(awaited, behind, loading):
            return None
        return found, [] if self._transfers is None else self._transfers.find(sequence, sequence.token_ids, first)

    def _next_full_block(self, sequence: Sequence, token_ids: list[int], index: int) -> tuple[int, BlockHash] | None:
        """Logical block `index` of a sequence and its name, if `token_ids` could have it from the cache."""
        if index >= (len(token_ids) - 1) // self._pool.block_size:
            return None
        return index, sequence.table.name_of(index, token_ids)

    def _is_on_its_way(self, block: tuple[int, BlockHash], behind: list[Sequence], loading: list[Sequence]) -> bool:
        """Whether somebody loads a block, or will compute it in this step or a later one."""
        (index, name), block_size = block, self._pool.block_size
        if self._transfers is not None and self._transfers.is_coming(name):
            return True
        return any(
            other.num_computed_tokens // block_size <= index < len(other.token_ids) // block_size
            and other.table.name_of(index, other.token_ids) == name
            for other in ([*behind, *loading] if loading else behind)
        )

    # -- what is counted ----------------------------------------------------------------------------------------------

    def count_hits(self, sequence: Sequence, hits: dict[str, int]) -> None:
        """Prompt tokens by where their KV was found, if this is how the group begins and not how it resumes."""
        group = sequence.group
        if group.num_preemptions or sequence is not group.leader:
            return
        for origin, found in hits.items():
            # After a restart of the engine, tokens that were output before may be found, too.
            num_tokens = min(found, group.num_prompt_tokens - group.num_cached_tokens)
            if num_tokens > 0:
                group.num_cached_tokens += num_tokens
                self._stats.total_prefix_hits += num_tokens
                for counts in (group.cached_tokens, self._stats.prefix_hits):
                    counts[origin] = counts.get(origin, 0) + num_tokens

    def explain(self, group: SequenceGroup) -> None:
        """Note why the first block that a group must compute was not found."""
        leader, request = group.leader, group.request
        prompt = request.prompt_token_ids
        covered = leader.num_computed_tokens // self._pool.block_size
        if covered >= (len(prompt) - 1) // self._pool.block_size or not self._pool.enable_prefix_caching:
            return
        group.miss = self._history.explain(
            prompt,
            covered,
            leader.table.name_of(covered, prompt),
            adapter=request.adapter,
            inputs=request.inputs,
        )
        misses = self._stats.prefix_misses
        misses[group.miss.reason] = misses.get(group.miss.reason, 0) + 1

    def _note_eviction(self, block: int, name: BlockHash) -> None:
        self._history.note_eviction(name)
        if self._save_evicted is not None:
            self._save_evicted(block, name)
