import pytest

from quire.kv_cache.block_pool import BlockPool, OutOfBlocksError


def named_pool(num_blocks: int) -> BlockPool:
    """A pool whose blocks are full, named b"0", b"1", … and freed in that order."""
    pool = BlockPool(num_blocks, 4)
    blocks = [pool.allocate() for _ in range(num_blocks)]
    for block in blocks:
        pool.write(block, 4)
        pool.set_hash(block, b"%d" % block)
    for block in blocks:
        pool.release(block)
    return pool


def test_a_new_pool_is_free() -> None:
    pool = BlockPool(3, 16)
    assert (pool.num_free, pool.num_used, pool.num_references) == (3, 0, 0)
    assert (pool.num_allocated_slots, pool.num_filled_slots, pool.num_shared_slots) == (0, 0, 0)
    assert list(pool.free_order()) == [0, 1, 2]


def test_an_empty_pool_gives_nothing() -> None:
    pool = BlockPool(0, 16)
    assert list(pool.free_order()) == []
    with pytest.raises(OutOfBlocksError, match="all 0 blocks are in use"):
        pool.allocate()


def test_the_last_block_can_be_taken_and_no_more() -> None:
    pool = BlockPool(1, 1)
    assert pool.allocate() == 0
    with pytest.raises(OutOfBlocksError, match="all 1 blocks are in use"):
        pool.allocate()
    assert (pool.num_free, pool.num_references) == (0, 1)
    pool.release(0)
    assert pool.allocate() == 0


def test_a_block_is_free_when_its_last_reference_goes() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.write(block, 3)
    pool.share(block)
    assert (pool.num_references, pool.num_shared_slots, pool.num_filled_slots) == (2, 4, 3)
    pool.release(block)
    assert (pool.num_free, pool.num_shared_slots, pool.num_wasted_slots) == (1, 0, 1)
    pool.release(block)
    assert (pool.num_free, pool.num_references, pool.num_filled_slots) == (2, 0, 0)


def test_blocks_without_content_are_taken_before_named_ones() -> None:
    pool = named_pool(4)
    blocks = [pool.find(b"%d" % index) for index in (1, 2)]
    for block in blocks:
        assert block is not None
        pool.share(block)
    pool.remove_hash(2)
    pool.release(1)
    pool.release(2)
    assert list(pool.free_order()) == [2, 0, 3, 1]
    assert pool.num_cached_free == 3


def test_the_least_recently_freed_name_is_evicted_first() -> None:
    pool = named_pool(3)
    pool.share(0)
    pool.release(0)
    assert [pool.allocate() for _ in range(3)] == [1, 2, 0]
    assert pool.total_evictions == 3
    assert (pool.find(b"0"), pool.num_cached_free) == (None, 0)


def test_a_freed_block_keeps_its_name_until_its_space_is_needed() -> None:
    pool = named_pool(2)
    assert (pool.num_free, pool.num_cached_free, pool.find(b"1")) == (2, 2, 1)
    pool.share(1)
    assert (pool.num_free, pool.num_cached_free, pool.num_filled_slots) == (1, 1, 4)
    assert pool.allocate() == 0
    assert (pool.find(b"0"), pool.find(b"1"), pool.total_evictions) == (None, 1, 1)


def test_sharing_takes_a_block_out_of_the_middle_of_the_free_list() -> None:
    pool = named_pool(5)
    pool.share(2)
    assert list(pool.free_order()) == [0, 1, 3, 4]


def test_the_first_of_twins_keeps_the_name() -> None:
    pool = BlockPool(2, 1)
    first, second = pool.allocate(), pool.allocate()
    pool.set_hash(first, b"name")
    pool.set_hash(second, b"name")
    assert (pool.find(b"name"), pool.hashes[second]) == (first, None)
    pool.release(first)
    pool.release(second)
    assert list(pool.free_order()) == [second, first]


def test_a_block_is_named_once() -> None:
    pool = BlockPool(1, 1)
    block = pool.allocate()
    pool.set_hash(block, b"one")
    pool.set_hash(block, b"other")
    assert (pool.find(b"one"), pool.find(b"other")) == (block, None)


def test_forgotten_names_cannot_be_found() -> None:
    pool = named_pool(3)
    pool.share(1)
    pool.clear_hashes()
    assert [pool.find(b"%d" % index) for index in range(3)] == [None] * 3
    assert (pool.num_cached_free, pool.num_used) == (0, 1)
    pool.release(1)
    assert list(pool.free_order()) == [1, 0, 2]
    assert [pool.allocate() for _ in range(3)] == [1, 0, 2]
    assert pool.total_evictions == 0


def test_memory_that_was_written_is_taken_before_fresh_memory() -> None:
    pool = BlockPool(4, 1)
    for index in range(2):
        pool.set_hash(pool.allocate(), b"%d" % index)
    for block in (1, 0):
        pool.release(block)
    assert list(pool.free_order()) == [2, 3, 1, 0]
    pool.clear_hashes()
    assert list(pool.free_order()) == [1, 0, 2, 3]


def test_without_prefix_caching_nothing_is_named() -> None:
    pool = BlockPool(1, 1, enable_prefix_caching=False)
    block = pool.allocate()
    pool.set_hash(block, b"name")
    assert pool.find(b"name") is None
    pool.release(block)
    assert pool.num_cached_free == 0


def test_a_pool_of_a_million_blocks() -> None:
    pool = BlockPool(1_000_000, 16)
    assert pool.allocate() == 0
    assert pool.num_free == 999_999
