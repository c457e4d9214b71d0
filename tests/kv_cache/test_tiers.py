"""The index of the tiers: bounded, least recently used first, and the choice between loading and computing."""

import random

import pytest

from quire.kv_cache.tiers import DISK, HOST, MIN_STAGED_BLOCKS, STAGING_BYTES, Rate, Tier, TierIndex, num_staged_blocks
from quire.step import StepPlan


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def never(block_hash: bytes) -> bool:
    return False


def test_room_is_made_by_what_was_used_least_recently() -> None:
    tier = Tier(300, 100)
    for block_hash in (b"a", b"b", b"c"):
        assert tier.make_room(100, never) == []
        tier.add(block_hash, tier.block_bytes)
    tier.touch(b"a")
    assert tier.make_room(100, never) == [b"b"]
    assert tier.hashes() == [b"c", b"a"]
    assert (tier.stats.num_bytes, tier.stats.num_blocks, tier.stats.total_evicted) == (200, 2, 1)


def test_what_is_kept_makes_no_room() -> None:
    tier = Tier(300, 100, [(b"a", 100), (b"b", 100), (b"c", 100)])
    assert tier.make_room(200, lambda block_hash: block_hash == b"a") == [b"b", b"c"]
    assert tier.make_room(300, lambda block_hash: block_hash == b"a") is None
    assert tier.hashes() == [b"a"]


def test_a_block_larger_than_the_tier_never_fits() -> None:
    assert Tier(99, 100).make_room(100, never) is None


def test_blocks_of_other_models_take_room_and_give_it() -> None:
    """They come with their own size."""
    tier = Tier(1000, 100, [(b"other model", 700), (b"a", 100)])
    assert tier.make_room(300, never) == [b"other model"]
    assert (tier.stats.num_bytes, b"a" in tier, tier.remove(b"a"), tier.remove(b"a")) == (100, True, True, False)


@pytest.mark.parametrize("seed", range(5))
def test_sizes_against_a_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    tier, model = Tier(10, 2), []
    for _ in range(500):
        block_hash = b"%d" % rng.randrange(12)
        action = rng.randrange(3)
        if action == 0 and block_hash in model:
            tier.touch(block_hash)
            model.append(model.pop(model.index(block_hash)))
        elif action == 1:
            assert tier.remove(block_hash) == (block_hash in model)
            model = [other for other in model if other != block_hash]
        elif block_hash not in model:
            evicted = tier.make_room(2, never)
            assert evicted == model[: max(0, len(model) - 4)]
            model = [*model[len(evicted or ()) :], block_hash]
            tier.add(block_hash, tier.block_bytes)
        assert tier.hashes() == model
        assert tier.stats.num_bytes == 2 * len(model) <= 10


def test_the_faster_tier_is_asked_first() -> None:
    index = TierIndex(Clock(), host=Tier(9, 1, [(b"both", 1)]), disk=Tier(9, 1, [(b"both", 1), (b"disk", 1)]))
    assert [index.find(block_hash) for block_hash in (b"both", b"disk", b"none")] == [HOST, DISK, None]
    assert index.remove(b"both") == [(HOST, b"both"), (DISK, b"both")]
    assert index.find(b"both") is None


def test_a_rate_is_a_running_mean_that_grows_old() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.seconds_per_unit is None
    rate.measure(10, 1.0)
    rate.measure(10, 2.0)
    assert rate.seconds_per_unit == pytest.approx(0.12)
    rate.measure(0, 5.0)
    rate.measure(5, 0.0)
    assert rate.seconds_per_unit == pytest.approx(0.12)
    clock.now += 61
    assert rate.seconds_per_unit is None
    rate.measure(1, 3.0)
    assert rate.seconds_per_unit == 3.0


def index_with_rates(*, token: float, host: float = 0.0, disk: float = 0.0) -> TierIndex:
    """Seconds per token computed, and per block loaded."""
    index = TierIndex(Clock(), host=Tier(1, 1), disk=Tier(1, 1))
    index.measure_step(StepPlan(rows=[0], token_ids=[1] * 100), 100 * token)
    index.measure_load(HOST, 1, host)
    index.measure_load(DISK, 1, disk)
    return index


def test_what_was_never_measured_is_loaded() -> None:
    index = TierIndex(Clock(), disk=Tier(1, 1))
    assert index.num_worth_loading([[DISK]] * 5, 16, 0) == 5
    index.measure_load(DISK, 1, 1000.0)
    assert index.num_worth_loading([[DISK]] * 5, 16, 0) == 5


@pytest.mark.parametrize(
    ("stored_in", "queued", "worth"),
    [
        ([HOST] * 4, 0, 4),
        ([DISK] * 4, 0, 4),  # 8 ms to load, 16 ms to compute
        ([DISK] * 4, 6, 0),  # the queue takes 48 ms
        ([DISK] * 40, 6, 40),  # 368 ms against 640
        ([HOST, HOST, DISK], 6, 2),
        ([], 0, 0),
    ],
)
def test_the_faster_way_is_taken_by_measured_rates(stored_in: list[str], queued: int, worth: int) -> None:
    index = index_with_rates(token=0.001, host=0.0001, disk=0.008)
    assert index.num_worth_loading([[tier] for tier in stored_in], 16, queued) == worth


@pytest.mark.parametrize(("disk", "worth"), [(0.0159, 3), (0.0161, 0)])
def test_the_crossover_is_where_both_take_the_same_time(disk: float, worth: int) -> None:
    assert index_with_rates(token=0.001, disk=disk).num_worth_loading([[DISK]] * 3, 16, 0) == worth


def test_a_slow_spell_is_not_for_ever() -> None:
    clock = Clock()
    index = TierIndex(clock, disk=Tier(1, 1))
    index.measure_load(DISK, 1, 1000.0)
    clock.now += 50
    index.measure_step(StepPlan(rows=[0], token_ids=[1] * 100), 0.1)
    assert index.num_worth_loading([[DISK]], 16, 0) == 0
    clock.now += 20
    index.measure_step(StepPlan(rows=[0], token_ids=[1] * 100), 0.1)
    assert index.num_worth_loading([[DISK]], 16, 0) == 1


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 31), (16, 63), (256, 256)])
def test_steps_of_decoding_say_nothing_of_prompts(num_rows: int, num_tokens: int) -> None:
    index = TierIndex(Clock(), disk=Tier(1, 1))
    index.measure_step(StepPlan(rows=[0] * num_rows, token_ids=[1] * num_tokens), 1.0)
    index.measure_load(DISK, 1, 1000.0)
    assert index.num_worth_loading([[DISK]], 16, 0) == 1


def test_staging_is_bounded_in_bytes() -> None:
    assert num_staged_blocks(2**20) * 2**20 == STAGING_BYTES
    assert num_staged_blocks(2**30) == MIN_STAGED_BLOCKS


def test_a_tier_follows_what_others_store_and_remove() -> None:
    news = [[(b"a", 0), (b"new", 2)], [(b"new", 2), (b"unknown", 0)], [(b"new", 0)]]
    tier = Tier(10, 1, [(b"a", 1)], changes=lambda: news.pop(0) if news else ())
    seen: list[tuple[bytes, bool]] = []
    tier.listeners.append(lambda block_hash, is_stored: seen.append((block_hash, is_stored)))
    sizes = []
    for _ in range(4):
        tier.follow()
        sizes.append((tier.stats.num_blocks, tier.stats.num_bytes))
    assert sizes == [(1, 2), (1, 2), (0, 0), (0, 0)]
    assert seen == [(b"a", False), (b"new", True), (b"new", False)], "KV events say what is found here"
