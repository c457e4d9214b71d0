"""Which requests run when their adapters share few slots: nobody waits for a load of another, nobody starves."""

import threading

import pytest

from quire.engine.adapters import WaitingForAdapter
from quire.errors import CheckpointError, RequestError
from quire.request import Request
from quire.sampling_params import SamplingParams


class Slots:
    """Loads when it is let go on; folders named bad cannot be loaded."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.held = [""] * count
        self.loads: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __len__(self) -> int:
        return self.count

    def check(self, path: str) -> object:
        if path == "misfit":
            raise CheckpointError("it does not fit")
        return None

    def load(self, path: str, digest: str, slot: int) -> None:
        assert self.go_on.wait(10)
        if path == "bad":
            raise CheckpointError("it is damaged")
        self.loads.append(digest)
        self.held[slot] = digest


class Engine:
    """What the core does around it."""

    def __init__(self, num_slots: int) -> None:
        self.slots = Slots(num_slots)
        self.adapters = WaitingForAdapter(self.slots)
        self.running: dict[str, str] = {}
        self.failed: dict[str, RequestError] = {}
        self.num_requests = 0

    def add(self, adapter: str, path: str = "") -> str:
        self.num_requests += 1
        request = Request(
            request_id=f"{adapter}{self.num_requests}",
            prompt_token_ids=[1],
            params=SamplingParams(),
            adapter=adapter,
            adapter_path=path or adapter,
        )
        if self.adapters.add(request):
            self.running[request.request_id] = adapter
        return request.request_id

    def step(self, *, block: bool = True) -> None:
        for request, error in self.adapters.take(lambda: set(self.running.values()), block=block):
            if error is None:
                self.running[request.request_id] = request.adapter
            else:
                self.failed[request.request_id] = error
        assert all(adapter in self.slots.held for adapter in self.running.values()), "runs without its adapter"

    def settle(self) -> None:
        for _ in range(20):
            self.step()


@pytest.fixture
def engine() -> object:
    engine = Engine(2)
    yield engine
    engine.slots.go_on.set()
    engine.adapters.close()


def test_a_loaded_adapter_runs_at_once(engine: Engine) -> None:
    first = engine.add("a")
    assert first not in engine.running
    assert len(engine.adapters) == 1
    engine.settle()
    second = engine.add("a")
    assert {first, second} <= engine.running.keys()
    assert engine.slots.loads == ["a"]


def test_a_load_holds_no_other_request_up(engine: Engine) -> None:
    engine.add("a")
    engine.settle()
    engine.slots.go_on.clear()
    slow = engine.add("b")
    engine.step(block=False)
    again = engine.add("a")
    assert again in engine.running
    assert slow not in engine.running
    engine.slots.go_on.set()
    engine.settle()
    assert slow in engine.running


def test_the_least_recently_used_adapter_gives_up_its_slot(engine: Engine) -> None:
    for adapter in "ab":
        engine.add(adapter)
        engine.settle()
    engine.add("a")
    engine.running.clear()
    engine.add("c")
    engine.settle()
    assert sorted(engine.slots.held) == ["a", "c"]
    engine.running.clear()
    engine.add("b")
    engine.settle()
    assert sorted(engine.slots.held) == ["b", "c"]
    assert engine.adapters.total_loads == 4


def test_an_adapter_in_use_stays(engine: Engine) -> None:
    a, b = engine.add("a"), engine.add("b")
    engine.settle()
    c = engine.add("c")
    engine.settle()
    assert engine.running.keys() == {a, b}
    del engine.running[b]
    engine.settle()
    assert engine.running.keys() == {a, c}
    assert sorted(engine.slots.held) == ["a", "c"]


def test_traffic_for_two_adapters_does_not_starve_a_third(engine: Engine) -> None:
    engine.add("a")
    engine.add("b")
    engine.settle()
    third = engine.add("c")
    for _ in range(6):  # each running request ends and two new ones arrive
        ended = next(iter(engine.running))
        engine.add("a")
        engine.add("b")
        del engine.running[ended]
        engine.settle()
    assert third in engine.running
    # Those that waited behind it get their turn when it has ended.
    for _ in range(40):
        if not engine.running:
            engine.settle()
        if engine.running:
            del engine.running[next(iter(engine.running))]
        engine.settle()
    assert not engine.running
    assert len(engine.adapters) == 0


def test_a_failed_load_ends_its_requests_alone(engine: Engine) -> None:
    engine.add("a")
    engine.settle()
    bad, worse, good = engine.add("x", "bad"), engine.add("x", "bad"), engine.add("b")
    engine.settle()
    assert engine.failed.keys() == {bad, worse}
    assert "damaged" in str(engine.failed[bad])
    assert good in engine.running
    with pytest.raises(RequestError, match="does not fit"):
        engine.add("y", "misfit")
    engine.running.clear()
    for adapter in "cd":  # the slot of the failed load is free
        engine.add(adapter)
    engine.settle()
    assert sorted(engine.slots.held) == ["c", "d"]


@pytest.mark.parametrize("when", ["waiting", "loading", "draining"])
def test_an_aborted_request_leaves_nothing(engine: Engine, when: str) -> None:
    if when == "draining":
        engine.add("a")
        engine.add("b")
        engine.settle()
    if when == "loading":
        engine.slots.go_on.clear()
    gone = engine.add("c")
    if when != "waiting":
        engine.step(block=False)
    engine.adapters.abort(gone)
    engine.slots.go_on.set()
    engine.settle()
    assert len(engine.adapters) == 0
    assert gone not in engine.running
    later = [engine.add(adapter) for adapter in "ab"]
    engine.settle()
    assert set(later) <= engine.running.keys()
