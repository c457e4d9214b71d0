"""The C++ kernels against the reference in float64, in every build this machine can run."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.attention import AttentionShape, StepArrays
from quire.attention.plan import plan_attention
from quire.errors import ConfigError
from quire.kernels import AttentionParams, Kernels, KVLayer, cpu, kernels_for, reference
from tests.kernels.ragged_batch import RaggedBatch, Shape, ragged_batch

# Errors of float32 arithmetic on values of size one. They are the same for every KV type, since the reference reads the
# same rounded cache; this does not test how much rounding costs.
TOLERANCE = 5e-6
KV_FLOATS = [torch.float32, torch.float16, torch.bfloat16]
KV_DTYPES = [*KV_FLOATS, torch.int8]


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(best)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.dtype == torch.float32
    assert expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def check_attention(batch: RaggedBatch, **options: Any) -> None:
    """Where pairs of bfloat16 are multiplied, queries are rounded to it, which can be followed, and weights, which
    changes a sum of weighted values by no more than 2^-8 of the sum of their magnitudes."""
    found = cpu.paged_attention(*batch.inputs(**options))
    q, kv, plan, params = batch.in_float64(**options)
    if cpu.isa() != "avx512bf16" or batch.kv.keys.dtype != torch.bfloat16:
        assert_close(found, reference.paged_attention(q, kv, plan, params))
        return
    scale, softcap = np.float32(params.scale), np.float32(params.softcap)
    factor = scale / softcap if softcap else scale * np.float32(1.44269504)
    q = (batch.q * torch.tensor(factor)).bfloat16().double() / float(factor)
    expected = reference.paged_attention(q, kv, plan, params)
    magnitude = reference.paged_attention(q, replace(kv, values=kv.values.abs()), plan, params)
    assert ((found - expected).abs() <= 2**-8 * magnitude + 2 * TOLERANCE).all()


# Norms, rotary embedding, activations

ROWS = [(1, 8), (3, 64), (2, 77), (5, 4096), (300, 200)]


@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
def test_rms_norm(isa: str, tokens: int, hidden: int) -> None:
    x, weight = 3 * torch.randn(tokens, hidden), torch.rand(hidden)
    assert_close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))


@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
def test_add_rms_norm(isa: str, tokens: int, hidden: int) -> None:
    x, residual, weight = torch.randn(tokens, hidden), torch.randn(tokens, hidden), torch.rand(hidden)
    total = residual.double()
    expected = reference.add_rms_norm(x.double(), total, weight.double(), 1e-5)
    assert_close(cpu.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert_close(residual, total)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
def test_layer_norm(isa: str, tokens: int, hidden: int, with_bias: bool) -> None:
    """Of numbers whose mean is large beside their variance, alone and after an update."""
    x, weight, bias = torch.randn(tokens, hidden + 3)[:, 3:] + 9, torch.rand(hidden), torch.randn(hidden)
    shift, wide = (bias, bias.double()) if with_bias else (None, None)
    expected = reference.layer_norm(x.double(), None, weight.double(), wide, 1e-5)
    assert_close(cpu.layer_norm(x, None, weight, shift, 1e-5), expected, 2e-5)  # the mean loses digits
    residual, total = torch.randn(tokens, hidden), torch.empty(tokens, hidden, dtype=torch.float64)
    expected = reference.layer_norm(total.copy_(residual), x.double(), weight.double(), wide, 1e-5)
    assert_close(cpu.layer_norm(residual, x, weight, shift, 1e-5), expected, 2e-5)
    assert_close(residual, total)


def _row_peaks(kernel: Callable[..., None], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    peaks, ids = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int32)
    kernel(x, peaks, ids)
    return peaks, ids


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 15), (2, 1024), (5, 4099), (40, 3000)])
def test_row_peaks(isa: str, rows: int, columns: int) -> None:
    x = torch.randint(-5, 5, (rows, 2 * columns)).float()[:, :columns]  # most peaks stand in several places
    peaks, ids = _row_peaks(cpu.row_argmax, x)
    expected_peaks, expected_ids = _row_peaks(reference.row_argmax, x)
    assert torch.equal(peaks, expected_peaks)
    assert torch.equal(ids, expected_ids)


def test_row_peaks_of_what_is_not_finite(isa: str) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.full((6, 2050), -inf)
    x[1, 2040] = -1.0
    x[2, 7] = inf
    x[3, [2, 2049]] = nan
    x[3, 1] = inf
    x[4, 2049] = -nan
    x[5, 3], x[5, 1500] = -0.0, 0.0
    peaks, ids = _row_peaks(cpu.row_argmax, x)
    assert ids.tolist() == [0, 2040, 7, 2, 2049, 3]
    torch.testing.assert_close(peaks, torch.tensor([-inf, -1.0, inf, nan, nan, 0.0]), equal_nan=True)
    expected_peaks, expected_ids = _row_peaks(reference.row_argmax, x)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(peaks, expected_peaks, equal_nan=True)


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_rms_norm_heads(isa: str, tokens: int, head_dim: int) -> None:
    fused, weight = torch.randn(tokens, 12, head_dim), torch.rand(head_dim)
    expected = fused.double()
    reference.rms_norm_heads_(expected[:, 2:9], weight.double(), 1e-6)
    cpu.rms_norm_heads_(fused[:, 2:9], weight, 1e-6)
    assert_close(fused, expected)


@pytest.mark.parametrize("tokens", [0, 1, 130])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (24, 12), (128, 128)])
def test_rotary(isa: str, tokens: int, head_dim: int, rotary_dim: int) -> None:
    fused = torch.randn(tokens, 11, head_dim)
    expected = fused.double()
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
    angles = torch.rand(50, rotary_dim // 2, dtype=torch.float64)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    reference.rotary_(expected[:, :6], expected[:, 6:8], positions, cos_sin)
    cpu.rotary_(fused[:, :6], fused[:, 6:8], positions, cos_sin.float())
    assert_close(fused, expected)


@pytest.mark.parametrize("operation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
def test_activations(isa: str, operation: str, tokens: int, hidden: int) -> None:
    x = torch.cat((8 * torch.randn(tokens, hidden), torch.randn(tokens, hidden)), dim=1)

    def run(kernels: Kernels, x: Tensor) -> Tensor:
        if operation == "silu":
            return kernels.silu_and_mul(x)
        return kernels.gelu_and_mul(x, tanh=operation == "gelu_tanh")

    assert_close(run(cpu, x), run(reference, x.double()))


def test_activations_of_extremes(isa: str) -> None:
    gate = torch.tensor([-3e38, -1000.0, -89.0, -0.0, 0.0, 89.0, 1000.0, 3e38])
    x = torch.cat((gate, torch.ones(8))).view(1, 16)
    relu = gate.clamp(min=0).view(1, 8)
    for found in (cpu.silu_and_mul(x), cpu.gelu_and_mul(x, tanh=False), cpu.gelu_and_mul(x, tanh=True)):
        torch.testing.assert_close(found, relu)
    assert cpu.silu_and_mul(torch.full((1, 16), float("nan"))).isnan().all()


# The cache


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_write_kv(isa: str, dtype: torch.dtype, block_size: int) -> None:
    shapes = cpu.kv_cache_shapes(20, 3, block_size, 40, scaled=dtype == torch.int8)
    kv = KVLayer(*(torch.randn(shape).to(dtype) for shape in shapes))
    fused = torch.randn(20, 12, 40)
    slots = torch.randperm(20 * block_size)[:20].to(torch.int32)
    slots[3] = slots[17] = -1
    expected = KVLayer(kv.keys.clone(), kv.values.clone())
    reference.write_kv(fused[:, 3:6], fused[:, 6:9], expected, slots)
    cpu.write_kv(fused[:, 3:6], fused[:, 6:9], kv, slots)
    assert torch.equal(kv.keys, expected.keys)
    assert torch.equal(kv.values, expected.values)


@pytest.mark.parametrize("dtype", KV_FLOATS)
def test_write_kv_rounds_like_torch(isa: str, dtype: torch.dtype) -> None:
    """To nearest, ties to even, over all exponents; subnormals and NaN included. Beyond float16 lies its largest."""
    ties = torch.arange(0, 2**32, 2**11 + 2**8, dtype=torch.int64).to(torch.int32).view(torch.float32)
    numbers = torch.cat((ties, ties.view(torch.int32).bitwise_and(-4096).view(torch.float32)))
    numbers = numbers[: len(numbers) // 64 * 64].view(-1, 1, 64)
    n = len(numbers)
    kv = KVLayer(torch.zeros(n, 1, 64, 1, dtype=dtype), torch.zeros(n, 1, 1, 64, dtype=dtype))
    cpu.write_kv(numbers, numbers, kv, torch.arange(len(numbers), dtype=torch.int32))
    expected = (numbers.clamp(-65504, 65504) if dtype == torch.float16 else numbers).to(dtype)
    for found in (kv.keys.view(-1, 1, 64), kv.values.view(-1, 1, 64)):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0.0, 1.0, 2.0), expected.nan_to_num(0.0, 1.0, 2.0))


def test_values_beyond_float16_leave_attention_finite(isa: str) -> None:
    """A token with values of 1e6 does not turn what later tokens see into NaN."""
    kv = KVLayer(torch.zeros(1, 1, 32, 16).half(), torch.zeros(1, 1, 16, 32).half())
    k, v = torch.ones(3, 1, 32), torch.tensor([1e6, -1e6, 1.0]).view(3, 1, 1).expand(3, 1, 32).contiguous()
    cpu.write_kv(k, v, kv, torch.arange(3, dtype=torch.int32))
    batch = ragged_batch([(3, 1)], Shape(1, 1, 32))
    batch.plan.block_tables.zero_()
    found = cpu.paged_attention(torch.ones(1, 1, 32), kv, batch.plan, AttentionParams(1.0))
    torch.testing.assert_close(found, torch.full((1, 1, 32), 1 / 3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_copy_blocks(dtype: torch.dtype) -> None:
    keys, values = cpu.kv_cache_shapes(9, 2, 16, 32, scaled=dtype == torch.int8)
    layers = [KVLayer((9 * torch.randn(keys)).to(dtype), (9 * torch.randn(values)).to(dtype)) for _ in range(3)]
    expected = [KVLayer(layer.keys.clone(), layer.values.clone()) for layer in layers]
    pairs = torch.tensor([[0, 5], [0, 6], [3, 1]], dtype=torch.int32)
    reference.copy_blocks(expected, pairs)
    cpu.copy_blocks(layers, pairs)
    for found, wanted in zip(layers, expected, strict=True):
        assert torch.equal(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)


# Attention

MIXED = [(1, 1), (16, 1), (33, 33), (100, 7), (160, 32), (250, 1)]
SHAPES = [
    *(Shape(num_heads=2 * group, num_kv_heads=2, head_dim=64) for group in (1, 3, 4, 7, 8, 12)),
    *(Shape(head_dim=head_dim) for head_dim in (8, 32, 72, 80, 96, 128, 256)),
    *(Shape(block_size=block_size) for block_size in (1, 4, 8, 24, 32, 64)),
    Shape(num_heads=7, num_kv_heads=1, head_dim=80, block_size=8),
]


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_attention(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    check_attention(ragged_batch(MIXED, shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [0, 1, 40, 1000])
def test_paged_attention_variants(
    isa: str, dtype: torch.dtype, block_size: int, softcap: float, alibi: bool, window: int
) -> None:
    shape = Shape(block_size=block_size)
    batch = ragged_batch(MIXED, shape, dtype=dtype, window=window)
    slopes = torch.rand(shape.num_heads) if alibi else None
    check_attention(batch, window=window, softcap=softcap, alibi_slopes=slopes)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_sinks(isa: str, dtype: torch.dtype, window: int, options: dict[str, float]) -> None:
    """Above all scores, below them, and between."""
    batch = ragged_batch(MIXED, Shape(), dtype=dtype, window=window)
    sinks = torch.tensor([-200.0, -1.0, 0.5, 2.0, 20.0, 300.0])
    check_attention(batch, window=window, sinks=sinks, **options)


def test_a_sink_joins_a_row_once(isa: str) -> None:
    """Whether its keys are read as a whole, in parts, or with those of other sequences."""
    sinks = torch.linspace(-2, 3, 6)
    split = ragged_batch([(3000, 1), (50, 50), (2000, 3)], Shape(), num_threads=8)
    shared = ragged_batch([(600, 1)] * 16, Shape(), shared=dict.fromkeys(range(1, 16), (0, 32)))
    assert len(split.plan.merges) > 0
    assert len(shared.plan.shared) > 0
    for batch in (split, shared):
        check_attention(batch, sinks=sinks)
    whole = ragged_batch([(600, 1)] * 16, Shape(), num_threads=1, share_prefixes=False)
    check_attention(whole, sinks=sinks)


LATENT = [
    Shape(num_heads=6, num_kv_heads=1, head_dim=80, value_dim=64),
    Shape(num_heads=3, num_kv_heads=1, head_dim=36, value_dim=20, block_size=8),
    Shape(num_heads=16, num_kv_heads=1, head_dim=72, value_dim=56, block_size=24),
    Shape(num_heads=20, num_kv_heads=1, head_dim=576, value_dim=512),
]


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", LATENT, ids=str)
def test_latent_layers(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    check_attention(ragged_batch(MIXED, shape, dtype=dtype))


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_masks_and_parts_of_latent_layers(isa: str, dtype: torch.dtype) -> None:
    sequences, shape = [(700, 1), (900, 1), (600, 2), (16, 1)], LATENT[0]
    for window, options in ((0, {}), (300, {}), (0, {"sinks": torch.rand(6)}), (30, {"softcap": 2.0})):
        batch = ragged_batch(sequences, shape, dtype=dtype, window=window, num_threads=8, shared={1: (0, 40)})
        check_attention(batch, window=window, **options)
    assert len(batch.plan.merges) == 0 < len(ragged_batch(sequences, shape, num_threads=8).plan.merges)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_latent_layers_are_written_and_copied(isa: str, dtype: torch.dtype) -> None:
    keys, _ = cpu.kv_cache_shapes(20, 1, 16, 40, scaled=dtype == torch.int8)
    found = cpu.latent_layer(torch.randn(keys).to(dtype), 24)
    expected = reference.latent_layer(found.keys.clone(), 24)
    k = torch.randn(20, 1, 40)
    slots = torch.randperm(20 * 16)[:20].to(torch.int32)
    slots[3] = -1
    pairs = torch.tensor([[0, 5], [0, 6], [3, 1]], dtype=torch.int32)
    for kernels, kv in ((cpu, found), (reference, expected)):
        kernels.write_kv(k, k[..., 16:], kv, slots)
        kernels.copy_blocks([kv], pairs)
    assert torch.equal(found.keys, expected.keys)
    assert found.values.data_ptr() == found.keys[:, :, 16:].data_ptr()


@pytest.mark.parametrize("seed", range(12))
def test_paged_attention_of_random_batches(isa: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    num_kv_heads = int(random.integers(1, 5))
    shape = Shape(
        num_heads=num_kv_heads * int(random.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        head_dim=int(random.choice([16, 32, 40, 64, 128])),
        block_size=int(random.choice([1, 3, 8, 16, 32, 48])),
    )
    sequences = []
    for _ in range(random.integers(1, 9)):
        length = int(random.integers(1, 200))
        sequences.append((length, int(random.choice([0, 1, length, int(random.integers(1, length + 1))]))))
    window = int(random.choice([0, int(random.integers(1, 200))]))
    threads = int(random.integers(1, 5))
    batch = ragged_batch(sequences, shape, window=window, num_threads=threads, seed=seed)
    found = cpu.paged_attention(*batch.inputs(window=window))
    assert_close(found, reference.paged_attention(*batch.in_float64(window=window)))


@pytest.mark.parametrize("window", [0, 1500])
def test_split_keys_are_merged(isa: str, window: int) -> None:
    batch = ragged_batch([(3000, 1), (50, 50), (2000, 3)], Shape(), window=window, num_threads=8)
    assert len(batch.plan.merges) > 0
    found = cpu.paged_attention(*batch.inputs(window=window))
    assert_close(found, reference.paged_attention(*batch.in_float64(window=window)))


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_tiles_that_end_with_a_block(isa: str, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    sequences = [(16, 1), (15, 2), (17, 1), (48, 3), (256, 1), (272, 20)]
    shape = Shape(head_dim=head_dim, block_size=block_size)
    check_attention(ragged_batch(sequences, shape, dtype=dtype, num_threads=1))


@pytest.mark.parametrize("seed", range(24))
def test_shared_prefixes(isa: str, seed: int) -> None:
    """Trees of prefixes at random, in any order, among sequences of other kinds, with every type and mask."""
    random = np.random.default_rng(seed)
    num_kv_heads = int(random.integers(1, 4))
    shape = Shape(
        num_heads=num_kv_heads * int(random.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=int(random.choice([16, 32, 40, 64])),
        block_size=int(random.choice([1, 8, 16, 24])),
    )
    sequences: list[tuple[int, int]] = []
    shared = {}
    for row in range(random.integers(2, 40)):
        length = int(random.integers(1, 900))
        sequences.append((length, min(length, int(random.choice([1, 1, 1, 1, 0, 2, 60])))))
        if row and random.random() < 0.9:
            other = int(random.integers(0, row))
            most = min(sequences[other][0], length - sequences[row][1]) // shape.block_size
            shared[row] = other, most - int(random.integers(0, min(3, most + 1)))
    window = int(random.choice([0, 0, 300]))
    softcap = float(random.choice([0.0, 3.0]))
    slopes = torch.rand(shape.num_heads) if random.random() < 0.3 else None
    batch = ragged_batch(
        sequences,
        shape,
        dtype=KV_DTYPES[seed % len(KV_DTYPES)],
        num_threads=int(random.integers(1, 5)),
        seed=seed,
        shared=shared,
        window=int(random.choice([0, window])),
    )
    check_attention(batch, window=window, softcap=softcap, alibi_slopes=slopes)


def test_prefixes_are_shared_where_it_pays() -> None:
    samples = dict.fromkeys(range(1, 16), (0, 32))

    def num_shared(shared: dict[int, tuple[int, int]], **options: Any) -> int:
        return len(ragged_batch([(600, 1)] * 16, Shape(), shared=shared, **options).plan.shared)

    assert num_shared(samples) > 0
    assert num_shared(samples, share_prefixes=False) == 0
    assert num_shared(samples, batch_invariant=True) == 0
    assert num_shared(samples, window=100) == 0
    assert num_shared({1: (0, 1)}) == 0
    assert num_shared({}) == 0


def test_large_scores_stay_finite(isa: str) -> None:
    batch = ragged_batch([(300, 20)], Shape())
    batch.q.mul_(300)
    assert_close(cpu.paged_attention(*batch.inputs()), reference.paged_attention(*batch.in_float64()), 1e-3)


def test_an_empty_batch(isa: str) -> None:
    batch = ragged_batch([], Shape())
    assert cpu.paged_attention(*batch.inputs()).shape == (0, 6, 64)
    batch = ragged_batch([(40, 0), (3, 0)], Shape())
    assert cpu.paged_attention(*batch.inputs()).shape == (0, 6, 64)


def test_threads_do_not_change_results() -> None:
    """The same plan gives the same bits whichever thread takes an item, and however often it runs."""
    batch = ragged_batch([(3000, 1), (200, 200), (700, 3)], Shape(), num_threads=4)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 4, 4):
            torch.set_num_threads(num_threads)
            results.append(cpu.paged_attention(*batch.inputs()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], each) for each in results[1:])


@pytest.mark.parametrize("window", [0, 300, 1500])
@pytest.mark.parametrize("shape", [Shape(), Shape(num_heads=7, num_kv_heads=1, head_dim=80, block_size=8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_invariant_plan_gives_a_token_the_same_bits_in_any_batch(
    isa: str, dtype: torch.dtype, shape: Shape, window: int
) -> None:
    """Tokens 900 to 1,299 of a sequence, across the first boundary between parts: with others and many threads, and
    alone in chunks."""
    sequences = [(1300, 400), (2500, 1), (90, 90)]
    batch = ragged_batch(sequences, shape, dtype=dtype, window=window, num_threads=8, batch_invariant=True)
    together = cpu.paged_attention(*batch.inputs(window=window))
    check_attention(batch, window=window)
    assert len(batch.plan.merges) > 0
    for chunk in (1, 7, 100):
        for first in range(0, 400, 9 * chunk):
            last = min(first + chunk, 400)
            step = StepArrays(
                np.array([0, last - first], dtype=np.int32),
                np.array([900 + last], dtype=np.int32),
                batch.plan.block_tables[:1].numpy(),
                np.zeros(last - first, dtype=np.int32),
            )
            plan = plan_attention(step, AttentionShape(**asdict(shape), window=window, batch_invariant=True))
            params = AttentionParams(batch.scale, window)
            alone = cpu.paged_attention(batch.q[first:last], batch.kv, plan, params)
            assert torch.equal(alone, together[first:last]), f"tokens {first} to {last}"


def test_a_sequence_of_nan_leaves_its_neighbours_alone(isa: str) -> None:
    sequences = [(40, 1), (100, 30), (70, 1)]
    clean, broken = ragged_batch(sequences, Shape()), ragged_batch(sequences, Shape())
    broken.q[1:31] = float("nan")
    expected, found = cpu.paged_attention(*clean.inputs()), cpu.paged_attention(*broken.inputs())
    assert found[1:31].isnan().all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[31], expected[31])


# The module


def test_kernels_for() -> None:
    assert kernels_for("cpu") is cpu
    with pytest.raises(ValueError, match=r"no kernels for .tpu."):
        kernels_for("tpu")


def test_arguments_are_checked() -> None:
    x, weight = torch.randn(2, 32), torch.rand(32)
    with pytest.raises(ValueError, match="x: expected float32, found float16"):
        cpu.rms_norm(x.half(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"weight: expected shape \[32\], found \[16\]"):
        cpu.rms_norm(x, weight[:16], 1e-5)
    with pytest.raises(ValueError, match=r"x: expected contiguous rows, found strides \[32, 2\]"):
        cpu.rms_norm(x[:, ::2], weight[:16], 1e-5)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        cpu.rms_norm(x, [1.0] * 32, 1e-5)  # type: ignore[arg-type]  # what an untyped caller may do
    k, keys, values = torch.randn(2, 1, 32), torch.zeros(4, 1, 32, 16), torch.zeros(4, 1, 16, 32)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="slots: expected int32, found int64"):
        cpu.write_kv(k, k, KVLayer(keys, values), slots.long())
    with pytest.raises(ValueError, match=r"v_cache: expected shape \[4, 1, 32, any\], found \[4, 1, 16, 32\]"):
        cpu.write_kv(k, k, KVLayer(values, values), slots)
    with pytest.raises(ValueError, match="k_cache: expected float32, float16 or bfloat16, found int16"):
        cpu.write_kv(k, k, KVLayer(keys.short(), values.short()), slots)
    with pytest.raises(ValueError, match=r"k: expected shape \[any, 1, 24\], found \[2, 1, 32\]"):
        cpu.write_kv(k, k, KVLayer(keys.char(), values.char()), slots)
    odd = KVLayer(torch.zeros(4, 1, 14, 16).char(), torch.zeros(4, 1, 16, 6).char())
    with pytest.raises(
        ValueError, match="k_cache: expected a head size that is a multiple of 4, at most 1024, for int8"
    ):
        cpu.write_kv(torch.zeros(2, 1, 6), torch.zeros(2, 1, 6), odd, slots)
    batch = ragged_batch([(40, 4)], Shape(), window=8)
    with pytest.raises(ValueError, match="window: expected 1 to 8"):
        cpu.paged_attention(*batch.inputs(window=9))
    with pytest.raises(ValueError, match=r"q: expected shape \[4, 6, 64\], found \[3, 6, 64\]"):
        cpu.paged_attention(batch.q[1:], *batch.inputs(window=8)[1:])


def test_an_unsupported_isa_is_refused() -> None:
    with pytest.raises(ConfigError, match="QUIRE_CPU_ISA=sse9: unknown; choose one of portable"):
        cpu.use_isa("sse9")


@pytest.mark.parametrize("isa", ["portable", "sse9"])
def test_the_environment_chooses_the_isa(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from quire.kernels import cpu; print(cpu.isa())"],
        env={**os.environ, "QUIRE_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    if isa == "portable":
        assert done.stdout.strip() == "portable"
    else:
        assert "QUIRE_CPU_ISA=sse9: unknown" in done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    """Two copies would mean two thread pools on the same cores."""
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "gomp" in line or "libomp" in line or "iomp" in line}
    # The oracle of the tokenizer tests brings its own, and is no part of Quire.
    runtimes = {path for path in runtimes if "sentencepiece" not in path}
    assert len(runtimes) == 1, runtimes


# The test at start


@pytest.mark.parametrize(
    ("stand_in", "fault"),
    [
        ("", None),
        ("linear", "a product with float32 weights"),
        ("linear_quantized", "a product with int8 weights"),
        ("experts", "experts in blocks of GGUF"),
        ("attention", "attention over float32"),
        ("illegal instruction", "an instruction that this CPU does not have"),
    ],
)
def test_a_build_that_computes_wrongly_is_found(isa: str, stand_in: str, fault: str | None) -> None:
    assert cpu._cpu.fault(isa, stand_in) == fault


def test_the_next_build_is_used_where_the_best_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best = cpu.isa()
    broken = cpu.supported_isas()[:1]
    monkeypatch.setattr(cpu._cpu, "fault", lambda isa: "attention over int8" if isa in broken else None)
    try:
        if len(cpu.supported_isas()) > 1:
            cpu.use_best_isa()
            assert cpu.isa() == cpu.supported_isas()[1]
            assert caplog.messages == [
                f"the {broken[0]} kernels fail their test on this machine (attention over int8); they are not used"
            ]
        broken = cpu.supported_isas()
        with pytest.raises(ConfigError, match="no build of the CPU kernels passes its test"):
            cpu.use_best_isa()
    finally:
        monkeypatch.undo()
        cpu.use_isa(best)


def test_a_forced_build_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = cpu.isa()
    monkeypatch.setattr(cpu._cpu, "fault", lambda isa: "attention over int8")
    with pytest.raises(ConfigError, match=r"QUIRE_CPU_ISA=portable: .* \(attention over int8\); leave it unset"):
        cpu.use_isa("portable")
    assert cpu.isa() == in_use
