"""The planner: what it covers, how evenly, and how fast."""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.attention import AttentionShape, StepArrays
from quire.attention.plan import (
    CpuAttentionPlan,
    MergeColumn,
    SharedColumn,
    WorkColumn,
    advance_plan,
    plan_attention,
)

HEADS = [(1, 1), (6, 2), (8, 8), (12, 1), (32, 8)]


def plan(
    sequences: list[tuple[int, int]],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    num_threads: int = 2,
    window: int = 0,
    batch_invariant: bool = False,
    block_tables: NDArray[np.int32] | None = None,
) -> CpuAttentionPlan:
    """Plan sequences given as (tokens, new tokens), with blocks of their own unless given."""
    lengths = np.array([length for length, _ in sequences], dtype=np.int32)
    if block_tables is None:
        width = -(-int(lengths.max(initial=0)) // 16)
        block_tables = np.arange(len(sequences) * width, dtype=np.int32).reshape(len(sequences), width)
    new = [count for _, count in sequences]
    shape = AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        block_size=16,
        num_threads=num_threads,
        window=window,
        batch_invariant=batch_invariant,
    )
    starts, slots = np.cumsum([0, *new]).astype(np.int32), np.zeros(sum(new), dtype=np.int32)
    return plan_attention(StepArrays(starts, lengths, block_tables, slots), shape)


def random_sequences(seed: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, random.choice([20, 300, 1500]), size=random.integers(1, 8))
    return [(int(n), int(random.choice([0, 1, n, random.integers(1, n + 1)]))) for n in lengths]


def times_seen(found: CpuAttentionPlan, sequences: list[tuple[int, int]], num_kv_heads: int) -> NDArray[np.int64]:
    """[T, num_kv_heads, longest sequence]: how many items show a key to a token."""
    longest = max((length for length, _ in sequences), default=0)
    seen = np.zeros((sum(new for _, new in sequences), num_kv_heads, longest), dtype=np.int64)
    for sequence, token, tokens, head, heads, key_begin, key_end, _, is_shared in found.work.tolist():
        assert key_begin < key_end <= sequences[sequence][0]
        if is_shared:
            rows = found.shared[token : token + tokens, SharedColumn.ROW].numpy()
            assert (found.shared[token : token + tokens, SharedColumn.POSITION] >= key_end).all()
        else:
            rows = np.arange(token, token + tokens)
            assert found.query_start_loc[sequence] <= token
            assert token + tokens <= found.query_start_loc[sequence + 1]
        seen[rows, head : head + heads, key_begin:key_end] += 1
    return seen


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_every_key_is_shown_once(seed: int, batch_invariant: bool) -> None:
    sequences = random_sequences(seed)
    num_heads, num_kv_heads = HEADS[seed % len(HEADS)]
    window = [0, 0, 17, 1000][seed % 4]
    threads = [1, 2, 16, 128][seed // 4 % 4]
    found = plan(
        sequences,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_threads=threads,
        window=window,
        batch_invariant=batch_invariant,
    )
    seen = times_seen(found, sequences, num_kv_heads)
    assert seen.max(initial=0) <= 1
    row = 0
    for length, new in sequences:
        for position in range(length - new, length):
            first = max(0, position - window + 1) if window else 0
            assert seen[row, :, first : position + 1].all(), "a key the token sees is in no item"
            row += 1


def sharing_tables(sequences: list[tuple[int, int]], seed: int) -> NDArray[np.int32]:
    """Each sequence begins like an earlier one, up to a block at random among those it only reads."""
    random = np.random.default_rng(seed)
    width = max(-(-length // 16) for length, _ in sequences)
    tables = np.arange(len(sequences) * width, dtype=np.int32).reshape(len(sequences), width)
    for row in range(1, len(sequences)):
        other = int(random.integers(0, row))
        most = min(sequences[other][0], sequences[row][0] - sequences[row][1]) // 16
        count = int(random.integers(most // 2, most + 1))
        tables[row, :count] = tables[other, :count]
    return tables


@pytest.mark.parametrize("seed", range(10))
def test_an_advanced_plan_shows_the_new_keys_too(seed: int) -> None:
    random = np.random.default_rng(seed)
    sequences = [(int(length), 1) for length in random.integers(1, random.choice([40, 3000]), size=9)]
    width = -(-max(length for length, _ in sequences) // 16) + 1
    tables = sharing_tables([(16 * width, 1)] * 9, seed) if seed % 2 else None
    found = plan(sequences, num_threads=[1, 2, 16][seed % 3], block_tables=tables)
    for _ in range(20):
        sequences = [(length + 1, 1) for length, _ in sequences]
        found.seq_lens.add_(1)
        found = advance_plan(found, np.zeros((9, width + 1), dtype=np.int32))
    seen = times_seen(found, sequences, 2)
    for row, (length, _) in enumerate(sequences):
        assert (seen[row, :, :length] == 1).all()
        assert not seen[row, :, length:].any()
    assert (
        found.shared[:, SharedColumn.POSITION] == found.seq_lens[found.shared[:, SharedColumn.ROW].long()] - 1
    ).all()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_shared_is_shown_once_to_everyone(seed: int) -> None:
    random = np.random.default_rng(seed)
    sequences = [(int(random.integers(600, 1500)), int(random.choice([1, 1, 1, 2, 80]))) for _ in range(12)]
    tables = sharing_tables(sequences, seed)
    found = plan(sequences, num_heads=2, block_tables=tables, num_threads=[1, 2, 16][seed % 3])
    assert len(found.shared) > 0
    seen = times_seen(found, sequences, 2)
    assert seen.max() == 1
    row = 0
    for length, new in sequences:
        for position in range(length - new, length):
            assert seen[row, :, : position + 1].all(), "a key the token sees is in no item"
            row += 1


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_partial_results_have_rows_of_their_own(seed: int, sharing: bool) -> None:
    """Every row of a merge is written once, and no merge takes another's."""
    sequences = [*random_sequences(seed), (9000, 1), *[(600, 1)] * 8]
    tables = sharing_tables(sequences, seed) if sharing else None
    found = plan(sequences, num_threads=[16, 256][seed % 2], block_tables=tables)
    assert len(found.merges) > 0
    written = np.zeros(len(found.partials), dtype=np.int64)
    for item in found.work.tolist():
        begin, tokens = item[WorkColumn.TOKEN_BEGIN], item[WorkColumn.NUM_TOKENS]
        first_head = item[WorkColumn.HEAD_BEGIN] * 3
        heads = np.arange(first_head, first_head + item[WorkColumn.NUM_HEADS] * 3)
        if item[WorkColumn.SHARED]:
            for row in found.shared[begin : begin + tokens, SharedColumn.PARTIAL_ROW].tolist():
                written[row + heads] += 1
        elif item[WorkColumn.PARTIAL_ROW] >= 0:
            for token in range(tokens):
                written[item[WorkColumn.PARTIAL_ROW] + token * 6 + heads] += 1
    assert (written == 1).all()
    merges = sorted(found.merges.tolist(), key=lambda merge: merge[MergeColumn.PARTIAL_ROW])
    end = 0
    for merge in merges:
        assert merge[MergeColumn.PARTIAL_ROW] == end
        assert merge[MergeColumn.NUM_PARTS] > 1
        end += merge[MergeColumn.NUM_TOKENS] * merge[MergeColumn.NUM_PARTS] * 6
    assert end == len(found.partials)
    tokens_of_merges = [m[MergeColumn.TOKEN_BEGIN] + t for m in merges for t in range(m[MergeColumn.NUM_TOKENS])]
    assert len(set(tokens_of_merges)) == len(tokens_of_merges)


def test_a_batch_invariant_plan_splits_by_position_alone() -> None:
    """At every 1,024 keys; what a window leaves out at the beginning, in steps of 256."""

    def parts(found: CpuAttentionPlan) -> list[tuple[int, int]]:
        return sorted({(item[WorkColumn.KEY_BEGIN], item[WorkColumn.KEY_END]) for item in found.work.tolist()})

    for threads in (1, 64):
        assert parts(plan([(3000, 1)], num_threads=threads, batch_invariant=True)) == [
            (0, 1024),
            (1024, 2048),
            (2048, 3000),
        ]
    assert parts(plan([(3000, 1)], window=1500, batch_invariant=True)) == [(1280, 2048), (2048, 3000)]


def cost(found: CpuAttentionPlan, group: int) -> NDArray[np.int64]:
    work = found.work.numpy().astype(np.int64)
    keys = work[:, WorkColumn.KEY_END] - work[:, WorkColumn.KEY_BEGIN]
    rows = np.maximum(work[:, WorkColumn.NUM_TOKENS] * group, 24)
    return np.asarray(keys * rows * work[:, WorkColumn.NUM_HEADS])


@pytest.mark.parametrize(
    "sequences",
    [
        [(32_000, 1)],
        [(2048, 2048)],
        [(32_000, 1), *[(500, 1)] * 63],
        [(4000, 100)] * 3,
        [(1000, 1)] * 40,
        [(64, 1)] * 256,
    ],
    ids=["one long decode", "one prefill", "ragged decode", "chunks", "even decode", "many short decodes"],
)
@pytest.mark.parametrize("threads", [2, 8])
def test_work_is_balanced(sequences: list[tuple[int, int]], threads: int) -> None:
    """Taking items in order, no thread ends later than 1.25 times the fair share."""
    found = plan(sequences, num_heads=32, num_kv_heads=8, num_threads=threads)
    load = np.zeros(threads)
    for item in cost(found, 4):
        load[load.argmin()] += item
    assert load.max() <= 1.25 * load.mean()


def test_one_thread_splits_nothing() -> None:
    found = plan([(20_000, 1), (40, 3)], num_threads=1)
    assert len(found.merges) == 0
    assert len(found.work) == 2


def test_nothing_to_do() -> None:
    assert len(plan([]).work) == 0
    assert len(plan([(30, 0), (2, 0)]).work) == 0


def test_a_block_table_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="room for 1 blocks of 16, too few for a sequence of 17 tokens"):
        plan([(17, 1)], block_tables=np.zeros((1, 1), dtype=np.int32))


@pytest.mark.parametrize(("num_sequences", "limit"), [(256, 2e-3), (1024, 4e-3)])
def test_planning_is_fast(num_sequences: int, limit: float) -> None:
    """The aim is 0.3 ms at 256 sequences; the limit leaves room for a busy machine."""
    sequences = [(1000, 1)] * num_sequences
    seconds = []
    for _ in range(20):
        start = time.thread_time()
        plan(sequences)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < limit
