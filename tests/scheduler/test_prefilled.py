"""Prompts that another engine computed: their blocks are read as those of the disk tier, as far as they can be had."""

import random
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace

import pytest

from quire.kv_cache.tiers import DISK
from quire.request import Request
from tests.scheduler.checked_engine import new_request
from tests.scheduler.fake_runner import kv_of_all
from tests.scheduler.test_block_offload import PROMPT, FakeDisk, TieredEngine, stats_of


def prefilled(request_id: str, prompt: list[int]) -> Request:
    return replace(new_request(request_id, prompt, max_tokens=6), prefilled=True)


def giver(prompts: list[list[int]], windows: Sequence[int] = (0,), num_snapshots: int | None = None) -> FakeDisk:
    """What an engine has stored by the time at which it has computed the prompts, and no later."""
    engine = TieredEngine(num_blocks=128, num_disk_blocks=200, windows=windows, num_snapshots=num_snapshots)
    for number, prompt in enumerate(prompts):
        engine.add(new_request(f"given {number}", prompt, max_tokens=1))
    engine.run()
    engine.finish_stores()
    return engine.disk


def fetching(
    disk: FakeDisk, windows: Sequence[int] = (0,), num_snapshots: int | None = None, patience: float = 1.0
) -> TieredEngine:
    """An engine with a disk of its own that can fetch what is on `disk`."""
    engine = TieredEngine(num_disk_blocks=40, windows=windows, num_snapshots=num_snapshots, patience=patience)
    engine.index.tiers[DISK].fetches = True
    engine.runner.disk = FakeDisk(ChainMap(engine.disk.blocks, disk.blocks), disk.broken)  # type: ignore[arg-type]
    return engine


def test_only_a_prefilled_prompt_is_fetched() -> None:
    engine = fetching(giver([PROMPT]))
    engine.add(new_request("own", [*PROMPT, 7], max_tokens=3))
    assert engine.step().num_scheduled_tokens == [13]
    engine.run()
    other = fetching(giver([PROMPT]))
    other.add(prefilled("fetched", [*PROMPT, 7]))
    assert other.step().rows == []
    plan = other.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([12], [1])
    other.run()
    assert stats_of(other, DISK)["hits"] == 12
    other.finish_stores()
    assert len(other.disk.blocks) == 4, "what was fetched is stored like any block"


@pytest.mark.parametrize("num_snapshots", [None, 6])
def test_it_is_fetched_even_if_computing_were_faster(num_snapshots: int | None) -> None:
    """The router gave the work to another engine, so that this one has time for others."""
    engine = fetching(giver([PROMPT], num_snapshots=num_snapshots), num_snapshots=num_snapshots)
    engine.index.measure_load(DISK, 1, 100.0)
    engine.index._compute_rate.measure(1000, 0.001)
    engine.add(prefilled("a", [*PROMPT, 7]))
    engine.run()
    assert stats_of(engine, DISK)["hits"] > 0


def test_an_engine_without_peers_asks_nobody() -> None:
    engine = fetching(giver([PROMPT]))
    engine.index.tiers[DISK].fetches = False
    engine.add(prefilled("a", [*PROMPT, 7]))
    assert engine.step().num_scheduled_tokens == [13]


def test_an_eager_tier_stores_while_the_prompt_is_computed_and_its_beginning_first() -> None:
    engine = TieredEngine(num_disk_blocks=50, max_num_batched_tokens=8)
    disk = engine.index.tiers[DISK]
    assert engine.scheduler._offload is not None
    disk.eager = True
    storing = engine.scheduler._offload._storing
    engine.pool.stored_listeners.append(lambda block, block_hash, *_: storing._note_idle(block, block_hash))
    request = new_request("a", 40, max_tokens=4)
    engine.add(request)
    for _ in range(4):
        engine.step()
    assert engine.scheduler.has_work
    kv = kv_of_all(request.prompt_token_ids)
    assert list(engine.disk.blocks.values())[:4] == [kv[:4], kv[4:8], kv[8:12], kv[12:16]]
    engine.run()


@pytest.mark.parametrize(("windows", "num_snapshots"), [((0,), None), ((0, 8), None), ((0,), 6)])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_missing_is_computed(windows: Sequence[int], num_snapshots: int | None, seed: int) -> None:
    """The engine checks every token; here blocks and states are lost, late, and wanted by several."""
    rng = random.Random(seed)
    start = [rng.randrange(100, 1000) for _ in range(20)]
    prompts = [[*start, *(rng.randrange(100, 1000) for _ in range(rng.randrange(1, 30)))] for _ in range(3)]
    disk = giver(prompts, windows, num_snapshots)
    for name in list(disk.blocks):
        if rng.random() < 0.2:
            del disk.blocks[name]
    engine = fetching(disk, windows, num_snapshots, patience=0.6)
    for number, prompt in enumerate([*prompts, *prompts]):
        engine.add(prefilled(f"{number}", [*prompt, 5]))
        for _ in range(rng.randrange(3)):
            engine.step()
        if rng.random() < 0.2:
            engine.abort(f"{number}")
    engine.run()
    assert engine.pool.num_used == 0
