"""The kernels in plain PyTorch against the reference in float64, by every path of their planner."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.attention import AttentionShape, StepArrays
from quire.attention import sdpa as planner
from quire.kernels import AttentionParams, KVLayer, reference, sdpa
from tests.kernels.ragged_batch import RaggedBatch, Shape, ragged_batch

SEQUENCES = [(1, 1), (70, 1), (64, 1), (130, 1), (90, 33), (40, 40), (17, 5), (65, 5)]


def replanned(batch: RaggedBatch, shape: Shape) -> sdpa.SdpaPlan:
    plan = batch.plan
    step = StepArrays(
        plan.query_start_loc.numpy(), plan.seq_lens.numpy(), plan.block_tables.numpy(), plan.slots.numpy()
    )
    return planner.plan_attention(step, AttentionShape(**asdict(shape)))


def head_major(batch: RaggedBatch, dtype: torch.dtype) -> KVLayer:
    return KVLayer(batch.kv.keys.transpose(2, 3).contiguous().to(dtype), batch.kv.values.to(dtype))


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 24}, {"softcap": 5.0}, {"alibi": True}, {"softcap": 5.0, "alibi": True, "window": 30}],
    ids=str,
)
@pytest.mark.parametrize("num_heads", [2, 6, 8, 14])
def test_attention(num_heads: int, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "GATHERED_SLOTS", 256)  # several runs of each length
    options = dict(options)
    slopes = torch.linspace(0.05, 0.4, num_heads) if options.pop("alibi", False) else None
    shape = Shape(num_heads=num_heads, block_size=64)
    batch = ragged_batch(SEQUENCES, shape)
    plan = replanned(batch, shape)
    assert len(plan.runs) > 5
    expected = reference.paged_attention(*batch.in_float64(**options, alibi_slopes=slopes))
    params = AttentionParams(batch.scale, **options, alibi_slopes=slopes)  # type: ignore[arg-type]
    found = sdpa.paged_attention(batch.q, head_major(batch, torch.float32), plan, params)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 24}, {"softcap": 5.0}], ids=str)
def test_sinks(options: dict[str, float]) -> None:
    shape = Shape(block_size=64)
    batch, sinks = ragged_batch(SEQUENCES, shape), torch.linspace(-3, 5, 6)
    expected = reference.paged_attention(*batch.in_float64(**options, sinks=sinks))
    params = AttentionParams(batch.scale, **options, sinks=sinks)  # type: ignore[arg-type]
    found = sdpa.paged_attention(batch.q, head_major(batch, torch.float32), replanned(batch, shape), params)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_layers(dtype: torch.dtype) -> None:
    shape = Shape(num_heads=6, num_kv_heads=1, head_dim=40, value_dim=24)
    batch = ragged_batch(SEQUENCES, shape)
    kv = sdpa.latent_layer(batch.kv.keys.transpose(2, 3).contiguous().to(dtype), 24)
    wide = reference.latent_layer(kv.keys.transpose(2, 3).contiguous().double(), 24)
    expected = reference.paged_attention(batch.q.double(), wide, batch.plan, AttentionParams(batch.scale))
    found = sdpa.paged_attention(batch.q, kv, replanned(batch, shape), AttentionParams(batch.scale))
    assert found.shape == (len(batch.q), 6, 24)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    k, slots = torch.randn(3, 1, 40), torch.tensor([5, -1, 16], dtype=torch.int32)
    sdpa.write_kv(k, k[..., 16:], kv, slots)
    sdpa.copy_blocks([kv], torch.tensor([[0, 2]], dtype=torch.int32))
    assert torch.equal(kv.keys[0, 0, 5], k[0, 0].to(dtype))
    assert torch.equal(kv.values[2, 0, 5], k[0, 0, 16:].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_attention_over_narrow_caches(dtype: torch.dtype) -> None:
    shape = Shape(block_size=16)
    batch = ragged_batch(SEQUENCES, shape)
    kv = head_major(batch, dtype)
    if dtype.itemsize == 1:
        kv = replace(kv, k_scale=torch.tensor([0.5, 1.25]), v_scale=torch.tensor([0.75, 2.0]))
    wide = replace(kv, keys=kv.keys.transpose(2, 3).contiguous().double(), values=kv.values.double())
    params = AttentionParams(batch.scale)
    expected = reference.paged_attention(batch.q.double(), wide, batch.plan, params)
    found = sdpa.paged_attention(batch.q, kv, replanned(batch, shape), params)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found = sdpa.paged_attention(batch.q.bfloat16(), kv, replanned(batch, shape), params)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("skipped", [[], [0], [3, 17], list(range(20))], ids=len)
def test_writing(dtype: torch.dtype, skipped: list[int]) -> None:
    fused = 200 * torch.randn(20, 12, 40)
    shapes = sdpa.kv_cache_shapes(6, 3, 16, 40)
    caches = [torch.randn(shape).to(dtype) for shape in shapes]
    slots = torch.randperm(6 * 16)[:20].to(torch.int32)
    slots[skipped] = -1
    scales = {}
    if dtype.itemsize == 1:
        scales = {"k_scale": torch.tensor([0.5, 1.25, 1.0]), "v_scale": torch.tensor([0.75, 2.0, 1.0])}
    expected = [cache.float() for cache in caches]
    twins = [expected[0].transpose(2, 3).to(dtype).contiguous(), expected[1].to(dtype)]
    for token, slot in enumerate(slots.tolist()):
        for cache, new, scale in zip(
            expected, (fused[token, 3:6], fused[token, 6:9]), scales.values() or (None, None), strict=True
        ):
            new = new if scale is None else new / scale[:, None]
            if slot >= 0:
                cache[slot // 16, :, slot % 16] = (
                    (new.clamp(-448, 448) if dtype.itemsize == 1 else new).to(dtype).float()
                )
    sdpa.write_kv(fused[:, 3:6], fused[:, 6:9], KVLayer(*caches, **scales), slots)
    reference.write_kv(fused[:, 3:6], fused[:, 6:9], KVLayer(*twins, **scales), slots)
    for cache, twin, wanted in zip(caches, (twins[0].transpose(2, 3), twins[1]), expected, strict=True):
        assert torch.equal(cache.float(), wanted)
        assert torch.equal(twin.float(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_operations(dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    x, residual, weight = torch.randn(5, 96), torch.randn(5, 96), torch.rand(96)

    def assert_close(found: Tensor, expected: Tensor) -> None:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)

    narrow, wide = residual.to(dtype), residual.to(dtype).double()
    expected = reference.add_rms_norm(x.to(dtype).double(), wide, weight.double(), 1e-5)
    assert_close(sdpa.add_rms_norm(x.to(dtype), narrow, weight, 1e-5), expected)
    assert_close(narrow, wide)
    fused = torch.randn(7, 5, 32).to(dtype)
    wide = fused.double()
    positions, angles = torch.randint(0, 50, (7,), dtype=torch.int32), torch.rand(50, 8).double()
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    reference.rotary_(wide[:, :3], wide[:, 3:4], positions, cos_sin)
    sdpa.rotary_(fused[:, :3], fused[:, 3:4], positions, cos_sin.float())
    assert_close(fused, wide)


def test_copying_blocks_of_bytes() -> None:
    kv = KVLayer(*(torch.randn(6, 2, 4, 8).to(torch.float8_e4m3fn) for _ in range(2)))
    before = kv.keys.float(), kv.values.float()
    sdpa.copy_blocks([kv], torch.tensor([[0, 5], [1, 4]], dtype=torch.int32))
    for cache, old in zip((kv.keys, kv.values), before, strict=True):
        assert torch.equal(cache.float()[[5, 4]], old[[0, 1]])
        assert torch.equal(cache.float()[:4], old[:4])


def test_runs_hold_every_token_once() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, 50).astype(np.int32)
    start = np.concatenate(([0], counts.cumsum())).astype(np.int32)
    seq_lens = counts + rng.integers(0, 300, 50).astype(np.int32)
    tables = np.zeros((50, 20), dtype=np.int32)
    slots = np.zeros(int(counts.sum()), np.int32)
    plan = planner.plan_attention(StepArrays(start, seq_lens, tables, slots), AttentionShape(**asdict(Shape())))
    tokens = torch.cat([run.tokens.flatten() for run in plan.runs])
    assert sorted(tokens.tolist()) == list(range(counts.sum()))
