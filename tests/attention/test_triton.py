"""The GPU's plan: every key a token sees is in exactly one item, and what a CUDA graph may rely on holds."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.attention import AttentionShape, StepArrays
from quire.attention.triton import GpuAttentionPlan, PlanBuffers, plan_attention
from quire.errors import ConfigError
from quire.kernels.gpu_plan import GatheredColumn, ItemColumn, MergeColumn

BLOCK_SIZE = 64


def buffers_for(group: int, num_sms: int = 4, **options: float) -> PlanBuffers:
    return PlanBuffers(shape_of(2 * group, 2), num_sms=num_sms, **options)


def shape_of(num_heads: int, num_kv_heads: int, head_dim: int = 64) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=BLOCK_SIZE,
        max_num_seqs=12,
        max_num_tokens=1024,
        max_blocks=64,
        kv_element_size=2,
    )


def plan(
    sequences: list[tuple[int, int]], buffers: PlanBuffers, shared: dict[int, int] | None = None, **options: int
) -> GpuAttentionPlan:
    """Plan sequences given as (tokens, new tokens), whose block tables count up; `shared` maps a sequence to the number
    of blocks that it shares with the first."""
    lengths = np.array([length for length, _ in sequences], dtype=np.int32)
    new = [new for _, new in sequences]
    width = -(-int(lengths.max(initial=0)) // BLOCK_SIZE)
    tables = np.arange(len(sequences) * width, dtype=np.int32).reshape(len(sequences), width)
    for row, count in (shared or {}).items():
        tables[row, :count] = tables[0, :count]
    starts = np.cumsum([0, *new]).astype(np.int32)
    step = StepArrays(starts, lengths, tables, np.arange(sum(new), dtype=np.int32))
    return plan_attention(step, buffers, **options)


def check_coverage(found: GpuAttentionPlan, sequences: list[tuple[int, int]], window: int) -> None:
    """Each new token has an output from one item, or from the parts that a merge names; together they hold each key
    that it sees once."""
    num_tokens = sum(new for _, new in sequences)
    seen: list[list[tuple[int, int, int]]] = [[] for _ in range(num_tokens)]  # (place, keys from, keys to)
    table_of = [s * found.block_tables.shape[1] for s, (_, new) in enumerate(sequences) for _ in range(new)]
    positions = [position for length, new in sequences for position in range(length - new, length)]
    for work in (found.narrow, found.wide):
        assert int(work.count) <= work.num_programs
        for item in work.items[: int(work.count)].tolist():
            assert item[ItemColumn.KEY_BEGIN] % found.tile == 0
            assert item[ItemColumn.KEY_BEGIN] < item[ItemColumn.KEY_END]
            for index in range(item[ItemColumn.NUM_TOKENS]):
                token, partial = item[ItemColumn.TOKEN] + index, item[ItemColumn.PARTIAL]
                assert item[ItemColumn.TABLE] == table_of[token]
                assert item[ItemColumn.POSITION] + index == positions[token]
                place = -1 if partial < 0 else partial + index
                seen[token].append((place, item[ItemColumn.KEY_BEGIN], item[ItemColumn.KEY_END]))
    tables = found.block_tables.numpy()
    for item in found.shared.items[: int(found.shared.count)].tolist():
        begin, end = item[ItemColumn.KEY_BEGIN], item[ItemColumn.KEY_END]
        assert begin < end
        assert begin % found.tile == end % found.tile == 0
        read = tables.ravel()[item[ItemColumn.TABLE] :][begin // BLOCK_SIZE : -(-end // BLOCK_SIZE)].tolist()
        first = item[ItemColumn.TOKEN]
        members = found.gathered[first : first + item[ItemColumn.NUM_TOKENS]].tolist()
        assert item[ItemColumn.POSITION] == min(member[GatheredColumn.POSITION] for member in members)
        for member in members:
            token = member[GatheredColumn.TOKEN]
            assert member[GatheredColumn.POSITION] == positions[token] >= end
            own = tables.ravel()[table_of[token] :][begin // BLOCK_SIZE : -(-end // BLOCK_SIZE)].tolist()
            assert own == read
            seen[token].append((member[GatheredColumn.PARTIAL], begin, end))
    merges = {merge[MergeColumn.TOKEN]: merge for merge in found.merges[: int(found.num_merges)].tolist()}
    places = [place for parts in seen for place, _, _ in parts if place >= 0]
    assert len(places) == len(set(places))
    assert max(places, default=0) < len(found.partials)
    for token, parts in enumerate(seen):
        if token in merges:
            _, first, num_parts, stride = merges[token]
            assert sorted(place for place, _, _ in parts) == [first + stride * part for part in range(num_parts)]
        else:
            assert [place for place, _, _ in parts] == [-1]
        ranges = sorted((begin, end) for _, begin, end in parts)
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ranges))
        first_visible = max(0, positions[token] - window + 1) if window else 0
        assert ranges[0][0] <= first_visible
        assert ranges[-1][1] >= positions[token] + 1


SEQUENCES = st.lists(
    st.tuples(st.integers(1, 4000), st.integers(1, 80)).map(lambda each: (max(each), min(each))),
    min_size=1,
    max_size=12,
)


@given(SEQUENCES, st.sampled_from([1, 4, 7, 8]), st.sampled_from([0, 100]))
def test_every_visible_key_is_read_once(sequences: list[tuple[int, int]], group: int, window: int) -> None:
    check_coverage(plan(sequences, buffers_for(group), window=window), sequences, window)


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 9), st.sampled_from([0, 3, 20])), min_size=8, max_size=12),
    st.sampled_from([1, 4, 40]),
    st.sampled_from([1, 16]),
    st.sampled_from([0, 300]),
)
def test_shared_keys_are_read_once(tails: list[tuple[int, int, int]], group: int, num_sms: int, window: int) -> None:
    """Of sequences with (tokens beyond what they share, new ones, blocks they share), some share two levels."""
    sequences = [(BLOCK_SIZE * blocks + tail + new, new) for tail, new, blocks in tails]
    shared = {row: blocks for row, (_, _, blocks) in enumerate(tails) if blocks <= tails[0][2]}
    buffers = buffers_for(group, num_sms, min_shared_bytes=-math.inf)
    check_coverage(plan(sequences, buffers, shared, window=window), sequences, window)
    decoding = [(length, 1) for length, _ in sequences]
    check_coverage(plan(decoding, buffers, shared, window=window, captured_tokens=12), decoding, window)


def test_a_prefix_is_shared_where_it_saves_enough() -> None:
    sequences = [(20 * BLOCK_SIZE + 9, 1)] * 12
    everyone = dict.fromkeys(range(12), 20)
    always = plan(sequences, buffers_for(4, min_shared_bytes=-math.inf), everyone)
    num_parts = 1 + int(always.shared.count)
    saved = 11 * 20 * BLOCK_SIZE * 2 * 2 * 64 * 2  # sharers but one, keys, of 2 heads of 64 keys and values in 16 bits
    saved -= 12 * num_parts * 8 * (64 + 1) * 4 * 2  # tokens, parts, of 8 heads float32 sums, written and read
    assert plan(sequences, buffers_for(4, min_shared_bytes=saved - 1), everyone).shared.num_programs
    assert not plan(sequences, buffers_for(4, min_shared_bytes=saved), everyone).shared.num_programs
    some = dict.fromkeys(range(7), 20)
    assert not plan(sequences, buffers_for(4, min_shared_bytes=-math.inf), some).shared.num_programs


@given(st.lists(st.integers(8, 4000), max_size=12), st.sampled_from([1, 4, 5]), st.integers(0, 12))
def test_a_captured_plan_launches_the_same_programs_whatever_the_step(
    lengths: list[int], query_len: int, num_sharers: int
) -> None:
    sequences = [(length, 1 + length % query_len) for length in lengths]
    buffers = buffers_for(4, min_shared_bytes=-math.inf)
    shared = {row: min(lengths[row], lengths[0]) // BLOCK_SIZE for row in range(min(num_sharers, len(lengths)))}
    found = plan(sequences, buffers, shared, captured_tokens=12 * query_len)
    check_coverage(found, sequences, window=0)
    other = plan([], buffers, variant=found.variant, captured_tokens=12 * query_len)
    assert other.variant == found.variant
    assert int(other.shared.count) == int(other.narrow.count) == int(other.num_merges) == 0
    for one, two in ((found.narrow, other.narrow), (found.wide, other.wide), (found.shared, other.shared)):
        assert (one.num_programs, one.num_rows) == (two.num_programs, two.num_rows)
        assert (one.items.data_ptr(), one.count.data_ptr()) == (two.items.data_ptr(), two.count.data_ptr())
    assert found.num_merge_programs == other.num_merge_programs >= int(found.num_merges)
    for name in ("slots", "gathered", "merges", "block_tables", "num_merges"):
        assert getattr(found, name).data_ptr() == getattr(other, name).data_ptr() != 0, name
    assert len(found.slots) == 12 * query_len


def test_one_long_sequence_is_spread_over_the_device() -> None:
    buffers = buffers_for(4, num_sms=16)
    found = plan([(4000, 1)] + [(64, 1)] * 7, buffers)
    keys = found.narrow.items[:, ItemColumn.KEY_END] - found.narrow.items[:, ItemColumn.KEY_BEGIN]
    assert keys.max() <= 4 * BLOCK_SIZE
    assert keys.tolist() == sorted(keys.tolist(), reverse=True)


def test_splits_stop_where_their_results_have_no_room() -> None:
    """Many tokens over many keys: parts get longer instead of more than fit."""
    sequences = [(4000, 80)] * 12
    check_coverage(plan(sequences, buffers_for(1, num_sms=1000)), sequences, window=0)


def test_what_does_not_fit_is_refused() -> None:
    buffers = buffers_for(4)
    with pytest.raises(ValueError, match="3 new tokens, up to 1 of one sequence, do not fit a graph of 2 tokens"):
        plan([(9, 1)] * 3, buffers, captured_tokens=2)
    with pytest.raises(ValueError, match="9 new tokens, up to 9 of one sequence, do not fit a graph of 12 tokens"):
        plan([(9, 9)], buffers, captured_tokens=12)
    one = np.ones(1, dtype=np.int32)
    with pytest.raises(ValueError, match="block_tables has room for 1 blocks of 64, too few for a sequence of 65"):
        plan_attention(StepArrays(np.arange(2, dtype=np.int32), 65 * one, one[None], one), buffers)
    with pytest.raises(ValueError, match="multiples of 16 from 16 to 256, found 8"):
        PlanBuffers(replace(shape_of(1, 1), block_size=8), num_sms=1)
    with pytest.raises(ConfigError, match=r"200 query heads share a KV head; .* takes 128 at most: choose sdpa"):
        PlanBuffers(shape_of(200, 1), num_sms=1)
    with pytest.raises(ConfigError, match=r"heads have 512 dimensions; .* takes 256 at most: choose sdpa"):
        PlanBuffers(shape_of(1, 1, 512), num_sms=1)
