"""Paged attention on a GPU, or in Triton's interpreter, against the reference in float64."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.attention import AttentionShape, StepArrays
from quire.attention.triton import GpuAttentionPlan, PlanBuffers, plan_attention
from quire.kernels import AttentionParams, Kernels, KVLayer, reference
from tests.kernels.ragged_batch import RaggedBatch, Shape, ragged_batch

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter

FP32, FP16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
# Of values of size one. Tensor cores round queries, keys and weights to the type; float8 is computed in float16.
TOLERANCE = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}

DECODE = [(33, 1), (1, 1), (200, 1)]
MIXED = [(70, 1), (150, 40), (9, 9), (130, 3)]
GQA1, GQA4, GQA7, GQA8 = Shape(2, 2, 64), Shape(4, 1, 64), Shape(7, 1, 64), Shape(8, 1, 64)


def blocks(shape: Shape, block_size: int) -> Shape:
    return Shape(shape.num_heads, shape.num_kv_heads, shape.head_dim, block_size)


def buffers_for(shape: Shape, device: torch.device, num_sms: int = 2, **options: float) -> PlanBuffers:
    of_attention = AttentionShape(
        **asdict(shape), max_num_seqs=12, max_num_tokens=256, max_blocks=64, kv_element_size=2, device=device
    )
    return PlanBuffers(of_attention, num_sms=num_sms, **options)


def plan_of(batch: RaggedBatch, buffers: PlanBuffers, **options: int) -> GpuAttentionPlan:
    of_cpu = batch.plan
    host = [each.numpy() for each in (of_cpu.query_start_loc, of_cpu.seq_lens, of_cpu.block_tables, of_cpu.slots)]
    return plan_attention(StepArrays(*host), buffers, **options)


def kv_of(batch: RaggedBatch, kv_dtype: torch.dtype, device: torch.device) -> KVLayer:
    """The batch's keys and values as a GPU lays them out."""
    keys, values = batch.kv.keys.transpose(2, 3).contiguous(), batch.kv.values
    return KVLayer(keys.to(device, kv_dtype), values.to(device, kv_dtype))


def expected_of(batch: RaggedBatch, q: Tensor, kv: KVLayer, **params: Any) -> Tensor:
    scales = (None if scale is None else scale.cpu() for scale in (kv.k_scale, kv.v_scale))
    on_host = KVLayer(kv.keys.cpu().double().transpose(2, 3), kv.values.cpu().double(), *scales)
    return reference.paged_attention(q.double(), on_host, batch.plan, AttentionParams(batch.scale, **params))


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("sequences", "shape", "dtype", "kv_dtype", "options"),
    [
        pytest.param(DECODE, blocks(GQA1, 16), FP32, FP32, {}, id="decode-fp32-gqa1-block16"),
        pytest.param(DECODE, blocks(GQA4, 64), FP16, FP16, {}, id="decode-fp16-gqa4-block64"),
        pytest.param(DECODE, blocks(GQA7, 256), BF16, BF16, {}, id="decode-bf16-gqa7-block256"),
        pytest.param(DECODE, blocks(GQA8, 48), FP32, FP32, {}, id="decode-fp32-gqa8-block48"),
        pytest.param(DECODE, Shape(4, 2, 80, 64), FP32, FP16, {}, id="decode-fp16kv-head80"),
        pytest.param(DECODE, Shape(2, 1, 128, 64), BF16, BF16, {}, id="decode-bf16-head128"),
        pytest.param([(40, 1)], Shape(2, 1, 256, 64), FP32, FP32, {}, id="decode-fp32-head256"),
        pytest.param([(40, 1)], Shape(2, 1, 8, 16), FP32, FP32, {}, id="decode-fp32-head8"),
        pytest.param([(40, 1)], Shape(20, 1, 64, 64), FP32, FP32, {}, id="decode-fp32-gqa20"),
        pytest.param([(90, 4), (5, 2), (160, 8)], blocks(GQA4, 64), BF16, BF16, {}, id="drafts-bf16-gqa4"),
        pytest.param([(90, 5), (64, 1)], blocks(GQA7, 64), FP32, FP32, {}, id="drafts-fp32-gqa7"),
        pytest.param(DECODE, Shape(4, 2, 64, 64), BF16, FP8, {}, id="decode-bf16-fp8kv"),
        pytest.param(DECODE, Shape(4, 2, 64, 64), BF16, FP8, {"softcap": 2.0}, id="decode-bf16-fp8kv-softcap"),
        pytest.param(DECODE, blocks(GQA4, 16), FP32, FP32, {"window": 37}, id="decode-window"),
        pytest.param(DECODE, blocks(GQA4, 64), BF16, BF16, {"window": 64}, id="decode-bf16-window"),
        pytest.param(DECODE, blocks(GQA4, 64), FP32, FP32, {"softcap": 2.0}, id="decode-softcap"),
        pytest.param(MIXED, blocks(GQA1, 16), FP32, FP32, {}, id="mixed-fp32-gqa1-block16"),
        pytest.param(MIXED, blocks(GQA4, 64), FP16, FP16, {}, id="mixed-fp16-gqa4-block64"),
        pytest.param(MIXED, blocks(GQA7, 64), BF16, BF16, {}, id="mixed-bf16-gqa7-block64"),
        pytest.param(MIXED, blocks(GQA8, 256), FP32, FP32, {}, id="mixed-fp32-gqa8-block256"),
        pytest.param(MIXED, Shape(8, 2, 64, 64), BF16, FP8, {}, id="mixed-bf16-fp8kv"),
        pytest.param(MIXED, blocks(GQA4, 64), FP32, FP32, {"window": 37}, id="mixed-window"),
        pytest.param(MIXED, blocks(GQA4, 64), FP32, FP32, {"window": 20, "softcap": 3.0}, id="mixed-window-softcap"),
    ],
)
def test_paged_attention(
    kernels: Kernels,
    device: torch.device,
    sequences: list[tuple[int, int]],
    shape: Shape,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    batch = ragged_batch(sequences, shape)
    kv = kv_of(batch, kv_dtype, device)
    q = batch.q.to(dtype)
    if kv_dtype == FP8:
        k_scale, v_scale = (torch.linspace(low, 1.25, shape.num_kv_heads, device=device) for low in (0.5, 0.75))
        kv = replace(kv, k_scale=k_scale, v_scale=v_scale)
    expected = expected_of(batch, q, kv, **options)
    for planned_window in {0, int(options.get("window", 0))}:
        plan = plan_of(batch, buffers_for(shape, device), window=planned_window)
        found = kernels.paged_attention(q.to(device), kv, plan, AttentionParams(batch.scale, **options))
        assert_close(found, expected, dtype)


def test_slopes(kernels: Kernels, device: torch.device) -> None:
    batch = ragged_batch(MIXED, blocks(GQA4, 64))
    kv = kv_of(batch, FP32, device)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    plan = plan_of(batch, buffers_for(blocks(GQA4, 64), device))
    params = AttentionParams(batch.scale, alibi_slopes=slopes.to(device))
    found = kernels.paged_attention(batch.q.to(device), kv, plan, params)
    assert_close(found, expected_of(batch, batch.q, kv, alibi_slopes=slopes), FP32)


@pytest.mark.parametrize("window", [0, 150])
def test_shared_prefixes(kernels: Kernels, device: torch.device, window: int) -> None:
    """A system prompt of all and a prompt of most of them; decode, drafts and a prompt together."""
    shape = blocks(GQA4, 16)
    sequences = [(200, 1), (230, 3), (160, 1), *[(170 + n, 1) for n in range(7)], (180, 30), (40, 1)]
    shared = {n: (0, 8 if n < 9 else 4) for n in range(1, 11)}
    batch = ragged_batch(sequences, shape, shared=shared)
    kv = kv_of(batch, FP32, device)
    plan = plan_of(batch, buffers_for(shape, device, num_sms=1, min_shared_bytes=-math.inf))
    assert int(plan.shared.count) > 1
    # The prompt's own window is the layer's affair: a plan for all layers shares whatever a layer sees of it.
    found = kernels.paged_attention(batch.q.to(device), kv, plan, AttentionParams(batch.scale, window))
    assert_close(found, expected_of(batch, batch.q, kv, window=window), FP32)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    params = AttentionParams(batch.scale, alibi_slopes=slopes.to(device))
    found = kernels.paged_attention(batch.q.to(device), kv, plan, params)
    assert_close(found, expected_of(batch, batch.q, kv, alibi_slopes=slopes), FP32)


def test_a_captured_plan_serves_another_step(kernels: Kernels, device: torch.device) -> None:
    """What a graph holds is the launch of one plan; the next plan's numbers lie in the same memory."""
    shape = blocks(GQA4, 64)
    buffers = buffers_for(shape, device)
    captured = plan_of(ragged_batch([(9, 1)] * 6, shape), buffers, captured_tokens=6)
    batch = ragged_batch([(500, 1), (3, 1), (64, 1)], shape)
    replayed = plan_of(batch, buffers, captured_tokens=6)
    assert int(replayed.num_merges) == 1  # the long sequence's keys are split
    kv = kv_of(batch, FP32, device)
    q = torch.full((6, shape.num_heads, shape.head_dim), float("nan"))
    q[:3] = batch.q
    found = kernels.paged_attention(q.to(device), kv, captured, AttentionParams(batch.scale))
    assert_close(found[:3], expected_of(batch, batch.q, kv), FP32)
    assert captured.slots.tolist() == [*batch.plan.slots.tolist(), -1, -1, -1]


def test_arguments_are_checked(kernels: Kernels, device: torch.device) -> None:
    batch = ragged_batch([(40, 4)], blocks(GQA4, 64))
    kv, params = kv_of(batch, FP32, device), AttentionParams(batch.scale, window=8)
    plan = plan_of(batch, buffers_for(blocks(GQA4, 64), device), window=8)
    with pytest.raises(ValueError, match="window: expected 1 to 8"):
        kernels.paged_attention(batch.q.to(device), kv, plan, AttentionParams(batch.scale, window=9))
    with pytest.raises(ValueError, match=r"q: expected \[T, 1 x n, 64\]"):
        kernels.paged_attention(batch.q[..., ::2].to(device), kv, plan, params)
    short = replace(kv, keys=kv.keys[:, :, :16].contiguous())
    with pytest.raises(ValueError, match="blocks of a multiple of 64, found 16"):
        kernels.paged_attention(batch.q.to(device), short, plan, params)
