"""longest_prefix against its definition, for every mix of full attention and windows."""

import random

import pytest

from quire.kv_cache.block_hash import group_hash, root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import HOLE, BlockTable
from quire.kv_cache.prefix_search import longest_prefix

SIZE = 4
MIXES = [(0,), (6,), (1,), (4,), (0, 4), (0, 5), (0, 9, 2), (0, 0, 30), (9, 9), (0, 1)]


@pytest.mark.parametrize("alignment", [1, 12])
@pytest.mark.parametrize("windows", MIXES)
def test_the_longest_hit_that_every_group_can_serve(windows: tuple[int, ...], alignment: int) -> None:
    rng = random.Random(str(windows))
    pool = BlockPool(1, SIZE, windows=windows, window_alignment=alignment)
    for _ in range(60):
        limit, density = rng.randrange(16), rng.choice([0.5, 0.8, 0.95])
        held = [{index for index in range(16) if rng.random() < density} for _ in windows]

        def is_served(end: int, held: list[set[int]] = held) -> bool:
            """Each group has what the token after `end` blocks reads, and one block at least."""
            firsts = [min(pool.first_kept(group, end * SIZE), end - 1) for group in range(len(windows))]
            return all(have >= set(range(first, end)) for first, have in zip(firsts, held, strict=True))

        expected = max(end for end in range(limit + 1) if end == 0 or is_served(end))
        found = longest_prefix(
            pool, limit, lambda group, index, held=held: 100 * group + index if index in held[group] else None
        )  # type: ignore[misc]
        assert [len(blocks) for blocks in found] == [expected] * len(windows)
        for group, blocks in enumerate(found):
            first = pool.first_kept(group, expected * SIZE)
            assert blocks == [100 * group + index if index >= first else None for index in range(expected)]


def named_table(pool: BlockPool, token_ids: list[int]) -> BlockTable:
    table = BlockTable(pool, root_hash("", pool.block_size))
    for start in range(0, len(token_ids), SIZE):
        count = min(SIZE, len(token_ids) - start)
        table.append(count, [])
        table.hash_full_blocks(token_ids, start + count)
        table.give_back(start + count)
    return table


def test_a_window_group_gives_back_what_no_token_sees_and_it_is_found_until_evicted() -> None:
    pool = BlockPool(20, SIZE, windows=(0, 6))
    token_ids = list(range(22))
    table = named_table(pool, token_ids)
    assert [block == HOLE for block in table.groups[1]] == [True] * 4 + [False] * 2
    assert (HOLE in table.groups[0], pool.num_used, pool.total_given_back) == (False, 8, 4)
    assert (table.serves(22), table.serves(20), table.serves(16)) == (True, False, False)
    child = BlockTable(pool, root_hash("", SIZE))
    found = child.find_prefix(token_ids[:17])
    assert [len(blocks) for blocks in found] == [4, 4]
    assert [block == HOLE for block in found[1]] == [True, True, False, False]
    child.adopt(found)
    assert (child.num_tokens, child.serves(16), pool.num_used) == (16, True, 10), "two blocks left the free list"
    child.free()
    table.free(token_ids)
    assert (pool.num_free, pool.num_references, pool.num_filled_slots) == (20, 0, 0)
    for _ in range(10):  # all that was never used, and the first two blocks that were given back
        pool.allocate()
    found = child.find_prefix([*token_ids, 0])
    assert [[block == HOLE for block in blocks] for blocks in found] == [[False] * 5, [True] * 3 + [False] * 2]
    pool.allocate()
    assert child.find_prefix([*token_ids, 0]) == [[], []], "of the last window a block is lost"


def test_blocks_of_one_content_in_two_groups_never_stand_for_each_other() -> None:
    pool = BlockPool(8, SIZE, windows=(0, 0))
    table = named_table(pool, [1, 2, 3, 4])
    first, second = (blocks[0] for blocks in table.groups)
    assert first != second
    assert pool.hashes[second] == group_hash(pool.hashes[first] or b"", 1) != pool.hashes[first]
    pool.remove_hash(second)
    assert BlockTable(pool, root_hash("", SIZE)).find_prefix([1, 2, 3, 4, 5]) == [[], []]


def test_each_group_copies_its_own_last_block() -> None:
    pool = BlockPool(12, SIZE, windows=(0, 6))
    table = named_table(pool, list(range(10)))
    child, copies = table.fork(), list[tuple[int, int]]()
    assert child.append(1, copies) == 2
    assert [source for source, _ in copies] == [blocks[-1] for blocks in table.groups]
    assert [target for _, target in copies] == [blocks[-1] for blocks in child.groups]
    assert table.num_copies_to_come == 0
