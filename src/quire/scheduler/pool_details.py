"""Describes requests and blocks for viewers: a row per request, the details of one. It only reads, between steps."""

from collections.abc import Iterable, Mapping

from quire.kv_cache.block_pool import BlockPool
from quire.pool_view import (
    MAX_DETAIL_HOLDERS,
    MAX_DETAIL_TOKENS,
    BlockDetail,
    BlockHolder,
    RequestDetail,
    RequestView,
    SampleDetail,
)
from quire.scheduler.sequence import NO_ROW, Sequence, SequenceGroup

_HASH_DIGITS = 12


def view_request(group: SequenceGroup, slot: int) -> RequestView:
    """A request's row."""
    sequences = group.sequences
    tables = [sequence.table.held_blocks for sequence in sequences]
    return RequestView(
        slot=slot,
        request_id=group.request.request_id,
        tenant=group.request.tenant,
        state=_state(group),
        num_samples=len(sequences),
        num_prompt_tokens=group.num_prompt_tokens,
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
        num_computed_tokens=sum(sequence.num_computed_tokens for sequence in sequences),
        num_blocks=len(tables[0]) if len(tables) == 1 else len(set().union(*tables)),
        num_references=sum(map(len, tables)),
        num_preemptions=group.num_preemptions,
        num_copied_blocks=group.num_copied_blocks,
        cached_tokens=group.cached_tokens.copy(),
        miss=group.miss,
    )


def _state(group: SequenceGroup) -> str:
    if group.leader.row == NO_ROW:
        return "preempted" if group.num_preemptions else "waiting"
    return "prefilling" if group.leader.num_missing_tokens > 1 else "decoding"


def detail_block(pool: BlockPool, groups: Iterable[SequenceGroup], block: int) -> BlockDetail | None:
    """The details of a block; None if the pool has no such block."""
    if not 0 <= block < pool.num_blocks:
        return None
    holders: list[BlockHolder] = []
    token_ids: list[int] = []
    for group in groups:
        for sequence in group.sequences:
            position = _position(sequence, block)
            if position is None:
                continue
            if len(holders) < MAX_DETAIL_HOLDERS:
                request = group.request
                holders.append(BlockHolder(request.request_id, request.tenant, sequence.index, position))
            start = position * pool.block_size
            stored = sequence.token_ids[start : min(start + pool.block_size, sequence.num_computed_tokens)]
            token_ids = max(token_ids, stored, key=len)
    block_hash = pool.hashes[block]
    return BlockDetail(
        block=block,
        num_references=pool.ref_counts[block],
        fill=pool.fill[block],
        cached=block_hash is not None or block in pool.children,
        pinned=block in pool.pinned,
        group=pool.group_of[block],
        seconds_since_taken=max(0.0, pool.now - pool.taken_at[block]),
        hash="" if block_hash is None else block_hash.hex()[:_HASH_DIGITS],
        holders=holders,
        token_ids=token_ids or _cached_tokens(pool, block),
    )


def _position(sequence: Sequence, block: int) -> int | None:
    """The logical block that is `block`."""
    for blocks in sequence.table.groups:
        if block in blocks:
            return blocks.index(block)
    return None


def _cached_tokens(pool: BlockPool, block: int) -> list[int]:
    """The tokens by which the prefix cache finds a block. A key of an image is no token, and stands as −1."""
    return [key if isinstance(key, int) else -1 for key in pool.children.tokens_of(block)]


def detail_request(groups: Mapping[str, SequenceGroup], request_id: str, slot: int) -> RequestDetail | None:
    """The details of an unfinished request; None if there is none of that id."""
    group = groups.get(request_id)
    if group is None:
        return None
    own = {block for sequence in group.sequences for block in sequence.table.held_blocks}
    shared_with: dict[str, int] = {}
    for other in groups.values():
        if other is not group and len(shared_with) < MAX_DETAIL_HOLDERS:
            theirs = {block for sequence in other.sequences for block in sequence.table.held_blocks}
            if common := len(own & theirs):
                shared_with[other.request.request_id] = common
    token_ids = group.leader.token_ids
    return RequestDetail(
        request=view_request(group, slot),
        samples=[
            SampleDetail(
                sequence.index,
                len(sequence.token_ids),
                sequence.num_computed_tokens,
                [blocks.copy() for blocks in sequence.table.groups],
            )
            for sequence in group.sequences
        ],
        shared_with=shared_with,
        token_ids=[token for token in token_ids[:MAX_DETAIL_TOKENS] if token >= 0],
        truncated=len(token_ids) > MAX_DETAIL_TOKENS,
    )
