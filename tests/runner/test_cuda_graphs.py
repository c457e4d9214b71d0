"""Which steps are captured, when, for which size and over which memory; on a CPU, by a graph that runs what it
recorded."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.runner import cuda_graphs
from quire.runner.cuda_graphs import (
    CAPTURE_SHARE,
    EAGER_STEPS,
    CudaCapture,
    DecodeGraphs,
    Graph,
    GraphKey,
    Outcome,
    graph_sizes,
)

CPU = torch.device("cpu")
PADDING = {"input_ids": np.int32(0), "rows": np.int32(99)}


class FakeGraph:
    def __init__(self, run: Callable[[], Tensor]) -> None:
        run()
        self.run, self.num_replays = run, 0
        self.result = run()

    def replay(self) -> None:
        self.num_replays += 1
        self.result.copy_(self.run())


class FakeCapture:
    """Takes a second of its own clock; what has no memory for it fails. Knows whether any graph is left."""

    def __init__(self, room: int = 10**6) -> None:
        self.graphs: list[FakeGraph] = []
        self.now, self.room = 0.0, room

    def __call__(self, run: Callable[[], Tensor], *, first: bool) -> tuple[Graph, Tensor]:
        assert first == (not self.graphs)
        self.now += 1.0
        graph = FakeGraph(run)
        if graph.result.shape[-1] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.graphs.append(graph)
        return graph, graph.result

    def clock(self) -> float:
        return self.now


def prepare_step(key: GraphKey, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """A step that reads all that a replay must find renewed."""
    assert inputs["rows"].tolist() == [99] * key.size, "captured over nothing but padding"
    if key.outcome is not Outcome.LOGITS:
        return lambda: torch.stack((inputs["input_ids"] + sum(key.variant), inputs["rows"]))
    return lambda: torch.stack((inputs["input_ids"], inputs["rows"], inputs["rows"]), dim=1).float()


def make_graphs(capture: FakeCapture, max_num_tokens: int = 40) -> DecodeGraphs:
    return DecodeGraphs(
        prepare_step, capture, padding=PADDING, max_num_tokens=max_num_tokens, device=CPU, clock=capture.clock
    )


def use(graphs: DecodeGraphs, key: GraphKey) -> None:
    """Steps enough to want a graph."""
    for _ in range(EAGER_STEPS):
        graphs.count_step(key)


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(256)[:6] == [1, 2, 4, 8, 16, 24]
    assert graph_sizes(256)[-1] == 256
    assert graph_sizes(2000)[-1] == 512
    for wanted in range(1, 513):
        size = next(size for size in graph_sizes(512) if size >= wanted)
        assert size <= 1.25 * wanted + 8
    assert make_graphs(FakeCapture(), 600).size_for(600) == 0


def test_replays_see_what_is_new_and_pad_what_is_not_there() -> None:
    rng, capture = np.random.default_rng(0), FakeCapture()
    graphs = make_graphs(capture)
    num_replays = 0
    for _ in range(200):
        num_tokens = int(rng.integers(1, 41))
        key = GraphKey(graphs.size_for(num_tokens), (16, int(rng.choice([0, 64]))), Outcome(rng.integers(3)))
        ids = rng.integers(0, 99, num_tokens).astype(np.int32)
        rows = np.arange(num_tokens, dtype=np.int32)
        if graphs.count_step(key):
            num_replays += 1
            result = graphs.replay(key, {"input_ids": ids, "rows": rows})
            found = (
                result - torch.tensor([[sum(key.variant)], [0]])
                if key.outcome is not Outcome.LOGITS
                else result[:, :2].T
            ).int()
            assert found[:, :num_tokens].tolist() == [ids.tolist(), rows.tolist()]
            assert found[:, num_tokens:].tolist() == [[0] * (key.size - num_tokens), [99] * (key.size - num_tokens)]
            result.fill_(-7)  # as a sampler may
        graphs.capture_one(idle=True)
    assert num_replays > 50
    assert sum(graph.num_replays for graph in capture.graphs) == num_replays


def test_what_comes_often_is_captured_and_memory_can_be_given_back() -> None:
    capture = FakeCapture()
    graphs = make_graphs(capture)
    key = GraphKey(4, (), Outcome.TOKENS)
    for _ in range(2):
        graphs.count_step(key)
        graphs.capture_one(idle=True)
        assert not graphs.has_pending_capture
        assert len(capture.graphs) == 0, "the first steps of a kind are eager"
        use(graphs, key)
        assert graphs.has_pending_capture
        graphs.capture_one(idle=True)
        assert capture.graphs[0].result.shape == (2, 40), "the largest comes first: others use its memory again"
        graphs.capture_one(idle=True)
        assert graphs.count_step(key)
        assert not graphs.has_pending_capture
        assert len(capture.graphs) == 2
        graphs.clear()
        capture.graphs.clear()


def test_captures_take_a_small_share_of_the_time_unless_idle() -> None:
    """A hundred steps of a second wait for a capture ten times at most, and never for two between each other."""
    capture = FakeCapture()
    graphs = make_graphs(capture, 512)
    for size in graph_sizes(512):
        use(graphs, GraphKey(size, (), Outcome.TOKENS))
    delays = []
    for _ in range(100):
        capture.now += 1.0
        before = capture.now
        graphs.capture_one(idle=False)
        delays.append(capture.now - before)
    assert max(delays) == 1.0
    assert 0 < sum(delays) <= CAPTURE_SHARE * capture.now + 1
    while graphs.has_pending_capture:
        graphs.capture_one(idle=True)
    assert len(capture.graphs) == len(graph_sizes(512))


def test_sizes_without_memory_run_without_a_graph() -> None:
    capture = FakeCapture(room=16)
    graphs = make_graphs(capture)
    use(graphs, GraphKey(16, (), Outcome.TOKENS))
    for _ in range(len([size for size in graph_sizes(40) if size > 16])):
        with pytest.raises(torch.OutOfMemoryError):
            graphs.capture_one(idle=True)
        use(graphs, GraphKey(16, (), Outcome.TOKENS))
    graphs.capture_one(idle=True)
    assert graphs.count_step(GraphKey(16, (), Outcome.TOKENS))
    assert [graphs.size_for(16), graphs.size_for(17)] == [16, 0]


def test_no_more_graphs_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was not replayed for longest goes, and must come often again."""
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 3)
    capture = FakeCapture()
    graphs = make_graphs(capture)
    keys = [GraphKey(size, (), Outcome.TOKENS) for size in (40, 1, 2, 4)]
    for key in keys[:3]:
        use(graphs, key)
        graphs.capture_one(idle=True)
    graphs.replay(keys[0], {})
    use(graphs, keys[3])
    graphs.capture_one(idle=True)
    assert [graphs.count_step(key) for key in keys] == [True, False, True, True]
    assert not graphs.has_pending_capture
    use(graphs, keys[1])
    assert graphs.has_pending_capture


def test_a_capture_that_fails_is_the_last() -> None:
    """Without memory smaller steps are tried; whatever else fails would fail again."""
    capture = FakeCapture()
    graphs = make_graphs(capture)
    use(graphs, GraphKey(8, (), Outcome.TOKENS))
    graphs.capture_one(idle=True)
    capture.graphs.clear()

    def failing(run: Callable[[], Tensor], *, first: bool) -> tuple[Graph, Tensor]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    graphs._capture = failing
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture_one(idle=True)
    assert not graphs.count_step(GraphKey(40, (), Outcome.TOKENS))
    assert graphs.size_for(1) == 0
    assert not graphs.has_pending_capture


class Allocator:
    """The pools of PyTorch's allocator: one that was used and that no graph is left of is not to be used again, as
    long as anything is in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.users: dict[int, weakref.WeakSet[Any]] = {}
        self.ready: list[object] = []
        self.stream: object = "default"
        allocator = self

        class CUDAGraph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert allocator.stream in allocator.ready, "cuBLAS would take its workspace from the pool"
                if pool in allocator.users:
                    assert len(allocator.users[pool]), "TORCH_INTERNAL_ASSERT use_count > 0"
                allocator.users.setdefault(pool, weakref.WeakSet()).add(self)

            def capture_end(self) -> None: ...

        @contextmanager
        def stream(entered: object) -> Iterator[None]:
            before, allocator.stream = allocator.stream, entered
            yield
            allocator.stream = before

        handles = itertools.count()
        zeros = torch.zeros
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kind: zeros(*shape, **kind))
        monkeypatch.setattr(torch, "mm", lambda a, b: allocator.ready.append(allocator.stream))


def test_graphs_are_captured_anew_after_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All share a pool of memory, and another one where all were forgotten."""
    allocator, capture = Allocator(monkeypatch), FakeCapture()
    graphs = DecodeGraphs(
        prepare_step, CudaCapture(), padding=PADDING, max_num_tokens=8, device=CPU, clock=capture.clock
    )
    for _ in range(3):
        for size in (4, 8):
            use(graphs, GraphKey(size, (), Outcome.TOKENS))
        while graphs.has_pending_capture:
            graphs.capture_one(idle=True)
        assert [len(users) for users in allocator.users.values()][-1] == 2
        graphs.clear()
        gc.collect()
    assert len(allocator.users) == 3


def test_graphs_that_end_in_logits_share_their_memory() -> None:
    graphs = make_graphs(FakeCapture())
    results = []
    for size in (8, 16):
        use(graphs, GraphKey(size, (), Outcome.LOGITS))
        while graphs.has_pending_capture:
            graphs.capture_one(idle=True)
        results.append(graphs.replay(GraphKey(size, (), Outcome.LOGITS), {}))
    assert results[0].data_ptr() == results[1].data_ptr()
