"""What viewers of the pool see is what the pool holds, for every viewer and pace, at a bounded cost."""

import random

import numpy as np
import pytest

from quire.engine.messages import ToEngine, WatchPool
from quire.engine.metrics import Metrics
from quire.engine.pool_mirror import MirrorReader, PoolMirror
from quire.engine.pool_views import MAX_VIEWERS, PoolViews, TooManyViewersError
from quire.engine.pool_watch import MAX_SHARE, PoolWatch
from quire.kv_cache.block_pool import BlockPool
from quire.outputs import EngineStats
from quire.pool_view import CACHED, OTHERS, PINNED, PoolFrame, RequestView
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepResult

SEEDS = range(12)


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """The real scheduler with random tokens."""

    def __init__(self, seed: int, num_blocks: int = 40, windows: tuple[int, ...] = (0,)) -> None:
        self.random = random.Random(seed)
        self.pool = BlockPool(num_blocks, 4, windows=windows)
        limits = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=32, max_model_len=96)
        self.scheduler = Scheduler(self.pool, limits)
        self.clock = Clock()
        self.watch = PoolWatch(self.scheduler, self.clock)
        self.number = 0

    def add(self, prompt: list[int], n: int = 1, max_tokens: int = 12, tenant: str = "") -> str:
        self.number += 1
        params = SamplingParams(n=n, max_tokens=max_tokens)
        request = Request(
            request_id=f"r{self.number}", prompt_token_ids=prompt, params=params, max_tokens=max_tokens, tenant=tenant
        )
        self.scheduler.add(request)
        return request.request_id

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.watch.note_copies(plan.block_copies)
        count = len(plan.sample_rows)
        tokens = [self.random.randrange(9) for _ in range(count)]
        self.scheduler.update(plan, StepResult(token_ids=tokens, logprobs=[None] * count, errors=[None] * count))
        self.watch.note_work()
        self.clock.now += 1.0

    def act(self) -> None:
        """Something random."""
        ids = [*self.scheduler.groups]
        if self.random.random() < 0.4 and len(ids) < 6:
            beginning = [1, 2, 3, 4, 5, 6, 7, 8][: self.random.randrange(9)]
            tenant = self.random.choice(["alice", "bob"])
            self.add([*beginning, self.random.randrange(9) + 1], self.random.choice([1, 1, 3]), 20, tenant)
        elif ids and self.random.random() < 0.15:
            self.scheduler.abort(self.random.choice(ids))
        if self.scheduler.has_work:
            self.step()
        self.watch.note_work()
        self.clock.now += 1.0


class Screen:
    """A viewer that applies frames as the page does."""

    def __init__(self, mirror: PoolMirror, tenant: str | None = None) -> None:
        self.reader = MirrorReader(mirror, tenant)
        self.blocks: dict[int, tuple[int, ...]] = {}
        self.rows: dict[int, RequestView] = {}

    def look(self) -> PoolFrame:
        frame = PoolFrame("ready")
        self.reader.catch_up(frame)
        if frame.shape is not None:
            self.blocks = dict.fromkeys(range(frame.shape.num_blocks), (0, 0, 0, 0, 0))
            self.rows = {}
        for first, count, *word in frame.blocks:
            self.blocks.update(dict.fromkeys(range(first, first + count), tuple(word)))
        for slot in frame.ended:
            del self.rows[slot]
        for row in frame.requests:
            self.rows[row.slot] = row
        return frame


def truth(engine: Engine) -> list[tuple[int, int, int, int]]:
    """References, fill, flags and group of every block, read the slow way."""
    engine.scheduler.update_fill()
    pool = engine.pool
    return [
        (
            pool.ref_counts[block],
            pool.fill[block],
            (CACHED if pool.hashes[block] is not None or block in pool.children else 0)
            + (PINNED if block in pool.pinned else 0),
            pool.group_of[block] if pool.num_groups > 1 else 0,
        )
        for block in range(pool.num_blocks)
    ]


def holders(engine: Engine, block: int) -> set[str]:
    return {
        request_id
        for request_id, group in engine.scheduler.groups.items()
        if any(block in sequence.table.held_blocks for sequence in group.sequences)
    }


@pytest.mark.parametrize("windows", [(0,), (0, 8)], ids=["one group", "a window"])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_viewer_sees_the_pool_whatever_its_pace(seed: int, windows: tuple[int, ...]) -> None:
    engine, mirror = Engine(seed, windows=windows), PoolMirror()
    quick, slow, num_looks = Screen(mirror), Screen(mirror), 0
    for _ in range(40):
        engine.act()
        change = engine.watch.look()
        if change is not None:
            mirror.apply(change)
        quick.look()
        if engine.random.random() < 0.15:
            slow.look()
        late = Screen(mirror)
        late.look()
        slow_now = engine.random.random() < 0.2
        if slow_now:
            slow.look()
        for screen in (quick, late, *((slow,) if slow_now else ())):
            assert [word[1:] for _, word in sorted(screen.blocks.items())] == truth(engine)
            names = {slot: row.request_id for slot, row in screen.rows.items()}
            assert set(names.values()) == set(engine.scheduler.groups)
            for block, (owner, *_rest) in screen.blocks.items():
                held_by = holders(engine, block)
                assert (names[owner] in held_by) if owner else not held_by
            num_looks += 1
    assert num_looks > 80


def test_rows_tell_sharing_copies_and_misses() -> None:
    engine, mirror = Engine(1), PoolMirror()
    screen = Screen(mirror)
    engine.add([1, 2, 3, 4, 5, 6], n=3)
    engine.step()
    mirror.apply(engine.watch.look())
    screen.look()
    (row,) = screen.rows.values()
    assert (row.state, row.num_samples, row.num_blocks, row.num_references) == ("decoding", 3, 2, 6)
    assert row.miss is not None
    assert row.miss.reason == "new"
    assert sorted(word[1] for word in screen.blocks.values())[-2:] == [3, 3]
    engine.step()
    mirror.apply(engine.watch.look())
    frame = screen.look()
    assert len(frame.copies) == 2
    assert {copy for _, copy in frame.copies} <= set(screen.blocks)
    (row,) = screen.rows.values()
    assert (row.num_copied_blocks, row.num_blocks) == (2, 4)


def test_a_tenant_sees_its_own_blocks_and_requests_only() -> None:
    engine, mirror = Engine(2), PoolMirror()
    alice, all_seeing = Screen(mirror, "alice"), Screen(mirror)
    mine, theirs = engine.add([1] * 9, tenant="alice", n=2), engine.add([2] * 9, tenant="bob", n=2)
    for _ in range(3):
        engine.step()
        mirror.apply(engine.watch.look())
        for screen in (alice, all_seeing):
            frame = screen.look()
            assert {row.tenant for row in frame.requests} <= ({"alice"} if screen is alice else {"alice", "bob"})
    shown = {block for block, word in alice.blocks.items() if any(word)}
    held = {block for block in range(40) if mine in holders(engine, block)}
    assert shown == held
    assert {block for block in range(40) if theirs in holders(engine, block)}
    engine.scheduler.abort(mine)
    engine.watch.note_work()
    engine.clock.now += 1
    mirror.apply(engine.watch.look())
    alice.look()
    assert not alice.rows
    assert not any(any(word) for word in alice.blocks.values())
    engine.step()
    mirror.apply(engine.watch.look())
    assert not alice.look().blocks


def test_requests_beyond_the_limit_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.engine.pool_watch.MAX_VIEWED_REQUESTS", 2)
    engine, mirror = Engine(3), PoolMirror()
    screen = Screen(mirror)
    for token in range(4):
        engine.add([token + 1] * 6)
    engine.step()
    mirror.apply(engine.watch.look())
    screen.look()
    assert len(screen.rows) == 2
    assert {word[0] for word in screen.blocks.values()} == {0, 1, 2, OTHERS}


def test_a_large_difference_comes_in_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.engine.pool_mirror.MAX_RUNS", 3)
    engine, mirror = Engine(4), PoolMirror()
    for token in range(5):
        engine.add([token + 1] * 7)
    engine.step()
    mirror.apply(engine.watch.look())
    screen, num_frames = Screen(mirror), 0
    while screen.reader.is_behind:
        assert len(screen.look().blocks) <= 3
        num_frames += 1
    assert num_frames > 1
    assert [word[1:] for _, word in sorted(screen.blocks.items())] == truth(engine)


def test_nothing_new_is_nothing_sent() -> None:
    engine = Engine(5)
    assert engine.watch.look() is not None
    assert engine.watch.seconds_to_look is None
    assert engine.watch.look() is None
    engine.watch.note_work()
    assert engine.watch.look() is None, "too early"
    wait = engine.watch.seconds_to_look
    assert wait is not None
    assert wait > 0
    engine.clock.now += wait
    assert engine.watch.look() is None, "nothing has changed"


@pytest.mark.parametrize("cost", [0.0001, 0.003, 0.5])
def test_looks_take_a_bounded_share_of_the_time(cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch paces itself by its own cost: whatever a look costs, the share stays below the limit."""
    engine = Engine(6)
    compare, num_looks = engine.watch._compare, 0

    def costly() -> object:
        nonlocal num_looks
        num_looks += 1
        engine.clock.now += cost
        return compare()

    monkeypatch.setattr(engine.watch, "_compare", costly)
    while engine.clock.now < 1000 * cost + 20:
        engine.watch.note_work()
        engine.watch.look()
        engine.clock.now += 0.01
    assert num_looks >= 5
    assert engine.watch.seconds_spent <= engine.clock.now * MAX_SHARE + cost
    assert num_looks <= engine.clock.now / 0.2 + 1


@pytest.fixture
def views() -> tuple[PoolViews, list[ToEngine]]:
    sent: list[ToEngine] = []
    return PoolViews(sent.append, state=lambda: "ready", stats=EngineStats, metrics=Metrics("m")), sent


def test_the_engine_records_while_somebody_looks(views: tuple[PoolViews, list[ToEngine]]) -> None:
    pool_views, sent = views
    first, second = pool_views.open(), pool_views.open("alice")
    assert sent == [WatchPool(on=True)]
    first.close()
    first.close()
    assert len(sent) == 1
    second.close()
    assert sent[1:] == [WatchPool(on=False)]
    pool_views.resume()
    pool_views.apply(Engine(7).watch.look())
    assert len(sent) == 2
    pool_views.open()
    pool_views.resume()  # a new engine process
    assert sent[2:] == [WatchPool(on=True)] * 2


def test_viewers_are_bounded(views: tuple[PoolViews, list[ToEngine]]) -> None:
    pool_views, _ = views
    opened = [pool_views.open() for _ in range(MAX_VIEWERS)]
    with pytest.raises(TooManyViewersError, match=f"{MAX_VIEWERS} viewers"):
        pool_views.open()
    opened[0].close()
    pool_views.open()


def test_words_of_a_pool_with_large_counts() -> None:
    from quire.scheduler.pool_words import block_words

    pool = BlockPool(3, 512)
    block = pool.allocate()
    pool.write(block, 300)
    for _ in range(400):
        pool.share(block)
    word = int(block_words(pool, [], {})[block])
    assert (word >> 16) & 255 == 255
    assert (word >> 24) & 65535 == 300
    assert np.count_nonzero(block_words(pool, [], {})) == 1
