"""Norms, activations, rotary embedding, KV writes and copies on a GPU, or in Triton's interpreter, against the
reference in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels import Kernels, KVLayer, reference
from quire.quantization import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # Triton's interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts a float32 off where it should round to bfloat16: one unit in the last place.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 64), (3, 77), (2, 1024)])
def test_rms_norm(kernels: Kernels, device: torch.device, dtype: torch.dtype, tokens: int, hidden: int) -> None:
    x, residual, weight = torch.randn(tokens, hidden), torch.randn(tokens, hidden), torch.rand(hidden)
    x, residual = x.to(device, dtype), residual.to(device, dtype)
    expected = reference.rms_norm(x.cpu().double(), weight.double(), 1e-5)
    assert_close(kernels.rms_norm(x, weight.to(device), 1e-5), expected, dtype)
    total = residual.cpu().double()
    expected = reference.add_rms_norm(x.cpu().double(), total, weight.double(), 1e-5)
    assert_close(kernels.add_rms_norm(x, residual, weight.to(device), 1e-5), expected, dtype)
    assert_close(residual, total, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_heads(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    fused, weight = torch.randn(3, 12, 80).to(device, dtype), torch.rand(80)
    expected = fused.cpu().double()
    reference.rms_norm_heads_(expected[:, 2:11], weight.double(), 1e-6)
    kernels.rms_norm_heads_(fused[:, 2:11], weight.to(device), 1e-6)
    assert_close(fused, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(3, 2 * 1100)).to(device, dtype)
    operations: list[Callable[[Kernels, Tensor], Tensor]] = [
        lambda of, x: of.silu_and_mul(x),
        lambda of, x: of.gelu_and_mul(x, False),
        lambda of, x: of.gelu_and_mul(x, True),
    ]
    for operation in operations:
        assert_close(operation(kernels, x), operation(reference, x.cpu().double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (24, 12)])
def test_rotary(kernels: Kernels, device: torch.device, dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    fused = torch.randn(3, 11, head_dim).to(device, dtype)
    expected = fused.cpu().double()
    positions = torch.tensor([0, 49, 7], dtype=torch.int32)
    cos_sin = cos_sin_table(rotary_dim)
    reference.rotary_(expected[:, :6], expected[:, 6:8], positions, cos_sin.double())
    kernels.rotary_(fused[:, :6], fused[:, 6:8], positions.to(device), cos_sin.to(device))
    assert_close(fused, expected, dtype)


def cos_sin_table(rotary_dim: int) -> Tensor:
    angles = torch.rand(50, rotary_dim // 2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def head_scales(device: torch.device) -> dict[str, Tensor]:
    """Powers of two, of three heads; none makes a number of float8 too small for it."""
    return {
        "k_scale": torch.tensor([0.5, 1.0, 0.25], device=device),
        "v_scale": torch.tensor([0.25, 0.5, 1.0], device=device),
    }


@pytest.mark.parametrize("kv_dtype", [*DTYPES, torch.float8_e4m3fn])
def test_write_kv(kernels: Kernels, device: torch.device, kv_dtype: torch.dtype) -> None:
    # Values that float8 holds: the interpreter loses the carry when rounding to it lengthens the number.
    fused = torch.randn(5, 9, 80).to(torch.float8_e4m3fn).float().to(device)
    slots = torch.tensor([3, 63, -1, 16, 40], dtype=torch.int32)
    shapes = kernels.kv_cache_shapes(5, 3, 16, 80)
    scales = head_scales(device) if kv_dtype.itemsize == 1 else {}
    kv = KVLayer(*(torch.zeros(shape, dtype=kv_dtype, device=device) for shape in shapes), **scales)
    expected_k, expected_v = torch.zeros(shapes[0]).double(), torch.zeros(shapes[1]).double()
    cached = KVLayer(expected_k.transpose(2, 3), expected_v, **{name: scale.cpu() for name, scale in scales.items()})
    reference.write_kv(fused[:, 3:6].cpu().double(), fused[:, 6:].cpu().double(), cached, slots)
    kernels.write_kv(fused[:, 3:6], fused[:, 6:], kv, slots.to(device))
    assert torch.equal(kv.keys.cpu().double(), expected_k)
    assert torch.equal(kv.values.cpu().double(), expected_v)


@pytest.mark.parametrize("rotary_dim", [80, 32])
def test_rotary_write_kv(kernels: Kernels, device: torch.device, rotary_dim: int) -> None:
    fused = torch.randn(5, 12, 80).to(device)
    expected = fused.cpu().double()
    slots, positions = torch.tensor([[3, 63, -1, 16, 40], [0, 9, 49, 1, 30]], dtype=torch.int32)
    cos_sin = cos_sin_table(rotary_dim)
    scales = head_scales(device)
    shapes = kernels.kv_cache_shapes(5, 3, 16, 80)
    kv = KVLayer(*(torch.zeros(shape, device=device) for shape in shapes), **scales)
    expected_k, expected_v = (torch.zeros(shape).double() for shape in shapes)
    q, k, v = expected.split_with_sizes((6, 3, 3), dim=1)
    cached = KVLayer(expected_k.transpose(2, 3), expected_v, **{name: scale.cpu() for name, scale in scales.items()})
    reference.rotary_write_kv(q, k, v, positions, cos_sin.double(), cached, slots)
    found = fused.split_with_sizes((6, 3, 3), dim=1)
    kernels.rotary_write_kv(*found, positions.to(device), cos_sin.to(device), kv, slots.to(device))
    assert_close(fused[:, :6], expected[:, :6], torch.float32)
    assert_close(kv.keys, expected_k, torch.float32)
    assert_close(kv.values, expected_v, torch.float32)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float8_e4m3fn, 448.0), (torch.float16, 65504.0)])
def test_what_a_cache_cannot_hold_becomes_the_largest(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, limit: float
) -> None:
    k = torch.tensor([1e6, -1e6, 448.0, 1.0]).repeat(4).view(1, 1, 16).to(device)
    kv = KVLayer(*(torch.zeros(1, 1, 16, 16, dtype=dtype, device=device) for _ in range(2)))
    kernels.write_kv(k, k, kv, torch.zeros(1, dtype=torch.int32, device=device))
    assert kv.keys[0, 0, 0, :4].float().tolist() == [limit, -limit, 448.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_copy_blocks(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    layers = [
        KVLayer(*(torch.randn(shape).to(device, dtype) for shape in kernels.kv_cache_shapes(6, 2, 16, 80)))
        for _ in range(3)
    ]
    expected = [KVLayer(layer.keys.cpu().double(), layer.values.cpu().double()) for layer in layers]
    pairs = torch.tensor([[0, 5], [2, 3], [0, 1]], dtype=torch.int32)
    reference.copy_blocks(expected, pairs)
    kernels.copy_blocks(layers, pairs.to(device))
    kernels.copy_blocks(layers, pairs[:0].to(device))
    for found, wanted in zip(layers, expected, strict=True):
        assert torch.equal(found.keys.cpu().double(), wanted.keys)
        assert torch.equal(found.values.cpu().double(), wanted.values)


def test_linear(kernels: Kernels, device: torch.device) -> None:
    weights = [torch.randn(5, 32, device=device), torch.randn(3, 32, device=device)]
    x, bias = torch.randn(4, 32, device=device).bfloat16(), torch.randn(8, device=device)
    packed = kernels.pack_linear(weights, "bfloat16")
    found = kernels.linear(x, packed, bias, 8)
    expected = x.double() @ torch.cat(weights).bfloat16().double().T + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1.6e-2, atol=5e-2)
    assert found.dtype == torch.bfloat16
    ids = torch.tensor([7, 0, 7], dtype=torch.int32, device=device)
    assert torch.equal(kernels.gather_rows(packed, ids, packed.shape[1]), packed[[7, 0, 7]])
    wide, update, scale = torch.cat((x, 2 * x), dim=1), -x, torch.rand(32, device=device)
    for activation, gate in (("silu", kernels.silu_and_mul), ("gelu", lambda x: kernels.gelu_and_mul(x, False))):
        expected = kernels.linear(gate(wide), packed, bias, 8)
        assert torch.equal(kernels.glu_linear(wide, activation, packed, bias, 8), expected)
    for added in (None, update):
        normed = kernels.rms_norm(x if added is None else x + added, scale, 1e-5)
        found = kernels.rms_norm_linear(x.clone(), added, scale, 1e-5, packed, bias, 8)
        assert torch.equal(found, kernels.linear(normed, packed, bias, 8))
    with pytest.raises(ConfigError, match="no int8 or int4 weights yet"):
        kernels.quantize_linear(weights, METHODS["int8"].layers)
