"""The FlashInfer backend with a FlashInfer that computes in float64 what its documentation says of its arguments."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.attention import AttentionShape, StepArrays, make_planner
from quire.attention.planners import Planner
from quire.errors import ConfigError
from tests.kernels.ragged_batch import RaggedBatch, Shape, ragged_batch
from tests.kernels.triton.test_attention import DECODE, GQA4, MIXED, blocks, caches_of, expected_of

SHAPE = blocks(GQA4, 16)
SCALES = {
    "k_scale": torch.linspace(0.5, 1.25, SHAPE.num_kv_heads),
    "v_scale": torch.linspace(0.75, 2, SHAPE.num_kv_heads),
}


class Wrapper:
    made: list["Wrapper"]

    def __init__(self, workspace: Tensor, kv_layout: str, *, backend: str) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "HND"
        self.backend = backend
        self.num_plans = 0
        self.made.append(self)

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *,
        causal: bool, sm_scale: float, window_left: int, logits_soft_cap: float,
        q_data_type: torch.dtype, kv_data_type: torch.dtype, max_token_per_sequence: int,
    ) -> None:  # fmt: skip
        assert all(each.device.type == "cpu" for each in (qo_indptr, paged_kv_indptr))  # else planning waits
        self.num_plans += 1
        self.planned = SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"})

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        planned, out = self.planned, torch.full_like(q, float("nan"))
        assert (q.dtype, paged_kv_cache[0].dtype) == (planned.q_data_type, planned.kv_data_type)
        assert int(planned.qo_indptr.diff().max()) == planned.max_token_per_sequence
        group = planned.num_qo_heads // planned.num_kv_heads
        for s, full_pages in enumerate((planned.paged_kv_indptr.diff() - 1).tolist()):
            first = int(planned.paged_kv_indptr[s])
            pages = planned.paged_kv_indices[first : int(planned.paged_kv_indptr[s + 1])].long()
            length = full_pages * planned.page_size + int(planned.paged_kv_last_page_len[s])
            k, v = (
                cache[pages].double().transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
                for cache in paged_kv_cache
            )
            rows = slice(int(planned.qo_indptr[s]), int(planned.qo_indptr[s + 1]))
            scores = q[rows].double().transpose(0, 1) @ k.transpose(1, 2) * planned.sm_scale
            if planned.logits_soft_cap > 0:
                scores = planned.logits_soft_cap * torch.tanh(scores / planned.logits_soft_cap)
            ahead = torch.arange(length) - (torch.arange(length)[length - (rows.stop - rows.start) :, None])
            hidden = ahead > 0 if planned.causal else torch.zeros_like(ahead, dtype=torch.bool)
            if planned.window_left >= 0:
                hidden |= ahead < -planned.window_left
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[rows] = (weights @ v).transpose(0, 1).to(q.dtype)
        return out


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Quire's module, over the FlashInfer above."""
    module: Any = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    Wrapper.made = []
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr("quire.backends.FLASHINFER_WORKSPACE", 64)
    yield importlib.import_module("quire.kernels.flashinfer")
    del sys.modules["quire.kernels.flashinfer"]


def planner(shape: Shape) -> Planner:
    return make_planner(
        "flashinfer",
        AttentionShape(
            num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
            block_size=shape.block_size, window=0, max_num_seqs=8, max_num_tokens=256, max_blocks=64, num_threads=1,
            kv_element_size=4, batch_invariant=False, device=torch.device("cpu"),
        ),
    )  # fmt: skip


def step(plan: Planner, batch: RaggedBatch) -> Any:
    of_cpu = batch.plan
    arrays = (x.numpy() for x in (of_cpu.query_start_loc, of_cpu.seq_lens, of_cpu.block_tables, of_cpu.slots))
    return plan(StepArrays(*arrays))


@pytest.mark.parametrize("sequences", [DECODE, MIXED])
@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 2.0}, SCALES])
def test_attention(flashinfer: Any, sequences: list[tuple[int, int]], options: dict[str, float]) -> None:
    batch = ragged_batch(sequences, SHAPE)
    caches = caches_of(batch, torch.float32, torch.device("cpu"))
    found = flashinfer.paged_attention(batch.q, *caches, step(planner(SHAPE), batch), batch.scale, **options)
    torch.testing.assert_close(found.double(), expected_of(batch, batch.q, caches, **options), rtol=2e-6, atol=2e-6)
    # Keys are split where sequences have few new tokens.
    assert [wrapper.backend for wrapper in Wrapper.made] == ["fa2" if sequences is DECODE else "auto"]


def test_layers_share_a_plan_and_steps_take_turns(flashinfer: Any) -> None:
    batch = ragged_batch(DECODE, SHAPE)
    caches = caches_of(batch, torch.float32, torch.device("cpu"))
    plan = planner(SHAPE)
    for _ in range(4):
        of_step = step(plan, batch)
        for window in (0, 20, 0, 20):
            flashinfer.paged_attention(batch.q, *caches, of_step, batch.scale, window=window)
    # Of each turn one for each window, planned in every second step.
    assert [wrapper.num_plans for wrapper in Wrapper.made] == [2, 2, 2, 2]
    assert np.array_equal(of_step.slots, batch.plan.slots)


def test_what_it_cannot_do_is_refused(flashinfer: Any) -> None:
    with pytest.raises(ConfigError, match=r"heads have 80 dimensions; .* takes 64, 128, 256: choose triton or sdpa"):
        planner(Shape(4, 2, 80, 16))
    batch = ragged_batch(DECODE, SHAPE)
    caches = caches_of(batch, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="alibi_slopes: FlashInfer has none but its own"):
        flashinfer.paged_attention(
            batch.q, *caches, step(planner(SHAPE), batch), batch.scale, alibi_slopes=torch.ones(4)
        )
