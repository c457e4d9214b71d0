"""EventRecorder on a real pool and tiers: a reader that applies its events knows what the pool holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.kv_cache.block_hash import hash_block, root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import DISK, HOST, Tier, TierIndex
from quire.kv_events import vllm_hash
from quire.kv_events.messages import BlockRemoved, BlockStored, low_bits
from quire.kv_events.recorder import EventRecorder

SIZE = 2


def store(pool: BlockPool, tokens: list[int], salt: str = "") -> list[bytes]:
    """Store a prompt's blocks and leave them cached; returns their hashes."""
    parent, hashes, blocks = root_hash(salt, SIZE), [], []
    for start in range(0, len(tokens), SIZE):
        part = tokens[start : start + SIZE]
        block_hash = hash_block(parent, part)
        block = pool.find(block_hash)
        if block is not None:
            pool.share(block)
        else:
            block = pool.allocate()
            pool.set_hash(block, block_hash, parent, part)
        blocks.append(block)
        hashes.append(block_hash)
        parent = block_hash
    for block in reversed(blocks):
        pool.release(block)
    return hashes


@given(st.lists(st.tuples(st.sampled_from(["store", "clear"]), st.integers(0, 3), st.integers(1, 4)), max_size=25))
def test_a_reader_knows_what_the_pool_holds(steps: list[tuple[str, int, int]]) -> None:
    pool = BlockPool(6, SIZE)
    recorder = EventRecorder(pool, None, "quire")
    known: set[int] = set()
    for what, kind, num_blocks in steps:
        if what == "store":
            store(pool, [kind * 100 + position for position in range(num_blocks * SIZE)])
        else:
            pool.clear_hashes()
        for event in recorder.take():
            assert isinstance(event, BlockStored | BlockRemoved)
            if isinstance(event, BlockStored):
                assert len(event.token_ids) == SIZE * len(event.block_hashes)
                known.update(map(low_bits, event.block_hashes))
            else:
                known.difference_update(map(low_bits, event.block_hashes))
        assert known == {low_bits(block_hash) for block_hash in pool.hashes if block_hash is not None}


def test_a_prompt_is_one_event_with_its_parent() -> None:
    pool = BlockPool(8, SIZE)
    recorder = EventRecorder(pool, None, "quire")
    first = store(pool, [1, 2, 3, 4])
    (event,) = recorder.take()
    assert event == BlockStored([low_bits(each) for each in first], None, [1, 2, 3, 4], SIZE)
    more = store(pool, [1, 2, 3, 4, 5, 6])
    (event,) = recorder.take()
    assert event == BlockStored([low_bits(more[2])], low_bits(first[1]), [5, 6], SIZE)


def test_vllms_hashes_on_request_and_own_ones_for_salted_prompts() -> None:
    pool = BlockPool(8, SIZE)
    recorder = EventRecorder(pool, None, "sha256_cbor")
    store(pool, [1, 2, 3, 4])
    (event,) = recorder.take()
    assert isinstance(event, BlockStored)
    one = vllm_hash.hash_block(vllm_hash.none_hash(), [1, 2])
    assert event.block_hashes == [low_bits(one), low_bits(vllm_hash.hash_block(one, [3, 4]))]
    own = store(pool, [1, 2], salt="tenant")
    (event,) = recorder.take()
    assert isinstance(event, BlockStored)
    assert event.block_hashes == [low_bits(own[0])]


@pytest.mark.parametrize(("tier_name", "medium"), [(HOST, "CPU"), (DISK, "STORAGE")])
def test_tiers_are_media(tier_name: str, medium: str) -> None:
    tier = Tier(1000, 10)
    pool = BlockPool(1, SIZE)
    recorder = EventRecorder(pool, TierIndex(lambda: 0.0, **{tier_name: tier}), "quire")
    (block_hash,) = store(pool, [1, 2])
    tier.add(block_hash, tier.block_bytes)
    tier.add(b"of another model", tier.block_bytes)
    store(pool, [3, 4])  # evicts the first
    tier.remove(block_hash)
    events = [event for event in recorder.take() if not isinstance(event, BlockStored) or event.token_ids != [3, 4]]
    name = low_bits(block_hash)
    assert events == [
        BlockStored([name], None, [1, 2], SIZE),
        BlockStored([name], None, [], SIZE, medium=medium),
        BlockRemoved([name], "GPU"),
        BlockRemoved([name], medium),
    ]
    assert recorder._names.keys() == {hash_block(root_hash("", SIZE), [3, 4])}  # bounded by what is held
