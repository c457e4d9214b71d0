"""The memory report: what each request holds of the pool. It only reads; it is a snapshot between two steps."""

from collections import Counter
from collections.abc import Iterable

from quire.kv_cache.block_pool import BlockPool
from quire.memory_stats import KVGroupMemory
from quire.outputs import AgeQuantiles, EngineStats, MemoryReport, RequestMemory
from quire.scheduler.sequence import NO_ROW, SequenceGroup

MAX_REPORTED_REQUESTS = 1000


def report_memory(pool: BlockPool, groups: Iterable[SequenceGroup], stats: EngineStats, now: float) -> MemoryReport:
    """The whole report. `now` is on the clock of `BlockPool.set_time`."""
    requests = sorted((_request_memory(pool, group) for group in groups), key=lambda request: not request.running)
    used = [now - pool.taken_at[block] for block, count in enumerate(pool.ref_counts) if count]
    cached = [now - pool.taken_at[block] for block in pool.free_order() if pool.hashes[block] is not None]
    return MemoryReport(
        stats=stats,
        waste=stats.waste,
        used_block_ages=_quantiles(used),
        cached_free_block_ages=_quantiles(cached),
        requests=requests[:MAX_REPORTED_REQUESTS],
        groups=_group_memory(pool),
    )


def _group_memory(pool: BlockPool) -> list[KVGroupMemory]:
    used = Counter(pool.group_of[block] for block, count in enumerate(pool.ref_counts) if count)
    cached = Counter(pool.group_of[block] for block in pool.free_order() if pool.hashes[block] is not None)
    return [KVGroupMemory(window, used[group], cached[group]) for group, window in enumerate(pool.windows)]


def _request_memory(pool: BlockPool, group: SequenceGroup) -> RequestMemory:
    blocks = Counter(block for sequence in group.sequences for block in sequence.table.held_blocks)
    num_shared_outside = sum(1 for block, mine in blocks.items() if pool.ref_counts[block] > mine)
    num_shared_inside = blocks.total() - len(blocks)
    num_filled_slots = sum(pool.fill[block] for block in blocks)
    num_allocated_slots = len(blocks) * pool.block_size
    return RequestMemory(
        request_id=group.request.request_id,
        running=group.leader.row != NO_ROW,
        num_sequences=len(group.sequences),
        num_tokens=sum(len(sequence.token_ids) for sequence in group.sequences),
        num_blocks=len(blocks),
        num_filled_slots=num_filled_slots,
        num_allocated_slots=num_allocated_slots,
        num_shared_slots=(num_shared_inside + num_shared_outside) * pool.block_size,
        num_copied_slots=group.num_copied_blocks * pool.block_size,
        waste=1 - num_filled_slots / num_allocated_slots if num_allocated_slots else 0.0,
        num_preemptions=group.num_preemptions,
        cached_tokens=group.cached_tokens.copy(),
        miss=group.miss,
        tenant=group.request.tenant,
    )


def _quantiles(seconds: list[float]) -> AgeQuantiles:
    if not seconds:
        return AgeQuantiles()
    seconds.sort()
    last = len(seconds) - 1
    return AgeQuantiles(p50=seconds[last // 2], p90=seconds[last * 9 // 10], max=seconds[last])
