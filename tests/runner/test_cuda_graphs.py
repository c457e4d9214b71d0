"""Which steps are captured, for which size, over which memory; on a CPU, by a graph that runs what it recorded."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.attention.triton import GpuAttentionPlan, PlanBuffers, plan_attention
from quire.kernels.interface import AttentionPlan
from quire.runner.cuda_graphs import EAGER_STEPS, DecodeGraphs, Graph, graph_sizes

CPU = torch.device("cpu")
Planned = tuple[GpuAttentionPlan, Tensor]
"""With the slots it should hold."""


class FakeGraph:
    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.num_replays = run, 0
        self.result = run()

    def replay(self) -> None:
        self.num_replays += 1
        self.result.copy_(self.run())


class FakeCapture:
    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        self.graphs.append(FakeGraph(run))
        return self.graphs[-1], self.graphs[-1].result


def model(input_ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
    """Reads all that a replay must find renewed: tokens, positions, and the plan's memory."""
    return torch.stack((input_ids, positions, plan.slots), dim=1).float()


@pytest.fixture
def buffers() -> PlanBuffers:
    return PlanBuffers(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        max_num_seqs=40,
        max_num_tokens=64,
        max_blocks=8,
        device=CPU,
        num_sms=4,
    )


def planned(buffers: PlanBuffers, num_seqs: int, size: int, rng: np.random.Generator) -> Planned:
    seq_lens = rng.integers(1, 100, num_seqs).astype(np.int32)
    tables = rng.permutation(num_seqs * 8).astype(np.int32).reshape(num_seqs, 8)
    slots = tables[np.arange(num_seqs), (seq_lens - 1) // 16] * 16 + (seq_lens - 1) % 16
    start = np.arange(num_seqs + 1, dtype=np.int32)
    plan = plan_attention(start, seq_lens, tables, slots.astype(np.int32), buffers=buffers, captured_seqs=size)
    return plan, torch.from_numpy(slots.astype(np.int32))


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(256)[:6] == [1, 2, 4, 8, 16, 24]
    assert graph_sizes(256)[-1] == 256
    assert graph_sizes(2000)[-1] == 512
    for wanted in range(1, 513):
        size = next(size for size in graph_sizes(512) if size >= wanted)
        assert size <= 1.25 * wanted + 8


def test_replays_see_what_is_new_and_pad_what_is_not_there(buffers: PlanBuffers) -> None:
    rng, capture = np.random.default_rng(0), FakeCapture()
    graphs = DecodeGraphs(model, capture, max_num_seqs=40, device=CPU)
    for step in range(60):
        num_seqs = int(rng.integers(1, 41))
        size = graphs.size_for(num_seqs)
        if not size:
            continue
        assert size >= num_seqs
        plan, slots = planned(buffers, num_seqs, size, rng)
        ids, positions = (torch.from_numpy(rng.integers(0, 99, num_seqs).astype(np.int32)) for _ in range(2))
        logits = graphs.run(size, ids, positions, plan)
        assert torch.equal(logits, torch.stack((ids, positions, slots), dim=1).float()), step
        padded = next(graph for graph in capture.graphs if len(graph.result) == size).result[num_seqs:]
        assert torch.equal(padded, torch.tensor([[0.0, 0.0, -1.0]]).expand(len(padded), 3)), "padding writes no KV"
        logits.fill_(-7)  # as a sampler may
    assert 1 < len(capture.graphs) <= len(graph_sizes(40))
    assert sum(graph.num_replays for graph in capture.graphs) > 2 * len(capture.graphs)


def test_first_steps_are_eager_and_memory_can_be_given_back(buffers: PlanBuffers) -> None:
    rng, capture = np.random.default_rng(1), FakeCapture()
    graphs = DecodeGraphs(model, capture, max_num_seqs=40, device=CPU)
    ids = torch.zeros(3, dtype=torch.int32)
    for _ in range(2):
        assert [graphs.size_for(3) for _ in range(EAGER_STEPS)] == [0] * EAGER_STEPS
        assert graphs.size_for(3) == graphs.size_for(4) == 4
        graphs.run(4, ids, ids, planned(buffers, 3, 4, rng)[0])
        graphs.run(4, ids, ids, planned(buffers, 3, 4, rng)[0])
        graphs.forget()
    assert [graph.num_replays for graph in capture.graphs] == [2, 2]


def test_batches_beyond_the_largest_graph_are_eager() -> None:
    graphs = DecodeGraphs(model, FakeCapture(), max_num_seqs=600, device=CPU)
    assert {graphs.size_for(600) for _ in range(3 * EAGER_STEPS)} == {0}
