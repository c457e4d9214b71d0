"""Weights that keep a checkpoint's bits, against the numbers their codes stand for, in every build of the kernels."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels import cpu, reference
from quire.kernels.coded import CodedMatrix, can_join
from quire.quantization.levels import E2M1, E4M3, SIGNED_BYTES, Levels, integers

NORMAL = tuple(torch.linspace(-1, 1, 16).pow(3).tolist())
LEVELS: dict[str, Levels] = {
    "table": NORMAL,
    "e2m1": E2M1,
    "nibbles": integers(4, 8),
    "bytes": integers(8, 100),
    "signed": SIGNED_BYTES,
    "e4m3": E4M3,
}


@pytest.fixture(params=cpu.supported_isas(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield
    cpu.use_isa(before)


def matrix(
    num_outputs: int,
    num_inputs: int,
    levels: Levels,
    group_size: int,
    *,
    offsets: str = "",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> CodedMatrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, len(levels), (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    if levels is E4M3:
        codes[codes & 127 == 127] = 0
    groups = (num_outputs, -(-num_inputs // group_size))
    scales = (torch.rand(groups, generator=generator) + 0.5).to(dtype) / 64
    others = torch.randint(0, 16, groups, generator=generator).to(dtype)
    return CodedMatrix(
        codes,
        scales,
        group_size,
        levels,
        zeros=others if offsets == "zeros" else None,
        shifts=others / 64 if offsets == "shifts" else None,
    )


def assert_product(found: Tensor, x: Tensor, weights: Sequence[CodedMatrix], bias: Tensor | None = None) -> None:
    """Against float64, to the error of sums of float32."""
    weight = torch.cat([each.dequantize() for each in weights]).double()
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    bound = x.abs().double() @ weight.abs().T + (0 if bias is None else bias.abs().double())
    assert bool(((found - expected).abs() <= 4e-6 * bound + 1e-6).all())


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(
    ("shape", "group_size", "offsets", "dtype"),
    [
        ((40, 64), 16, "", torch.float16),
        ((33, 200), 32, "zeros", torch.bfloat16),
        ((7, 77), 128, "shifts", torch.float32),
        ((70, 300), 24, "zeros", torch.float16),
        ((45, 520), 256, "shifts", torch.float16),
        ((300, 260), 1000, "zeros", torch.float16),
    ],
    ids=str,
)
def test_products(levels: str, shape: tuple[int, int], group_size: int, offsets: str, dtype: torch.dtype) -> None:
    weight = matrix(*shape, LEVELS[levels], group_size, offsets=offsets, dtype=dtype)
    packed = cpu.pack_coded([weight])
    bias = torch.randn(shape[0])
    for rows in (1, 9, 31):
        x = torch.randn(rows, shape[1])
        found = cpu.linear_coded(x, packed, bias, shape[0])
        assert_product(found, x, [weight], bias)
        alone = torch.cat([cpu.linear_coded(row[None], packed, bias, shape[0]) for row in x])
        assert torch.equal(alone, found), "a row's result depends on its batch"


def test_every_code_of_float8_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0
    weight = CodedMatrix(codes[:, None].expand(-1, 8).contiguous(), torch.ones(256, 1), 8, E4M3)
    found = cpu.linear_coded(torch.eye(8)[:1], cpu.pack_coded([weight]), None, 256)
    assert torch.equal(found[0], codes.view(torch.float8_e4m3fn).float())


def test_side_by_side_and_in_another_order() -> None:
    order = torch.randperm(64)
    parts = [replace(matrix(n, 64, NORMAL, 16, seed=n), order=order) for n in (40, 3, 30)]
    assert can_join(parts)
    assert not can_join([parts[0], replace(parts[1], order=None)])
    assert not can_join([parts[0], matrix(5, 64, NORMAL, 32)])
    x = torch.randn(5, 64)
    for kernels in (cpu, reference):
        packed = kernels.pack_coded(parts)  # type: ignore[attr-defined]  # both modules have it
        assert_product(kernels.linear_coded(x, packed, None, 73), x, parts)  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", [None, torch.arange(63, -1, -1)], ids=["", "ordered"])
def test_after_a_norm_and_a_gate(order: Tensor | None) -> None:
    weight = replace(matrix(48, 64, integers(4), 32, offsets="zeros"), order=order)
    packed, slow = cpu.pack_coded([weight]), reference.pack_coded([weight])
    x, residual, norm = torch.randn(5, 64), torch.randn(5, 64), torch.rand(64)
    found, expected = (
        module.rms_norm_linear(kept, x, norm, 1e-6, each, None, 48)
        for module, kept, each in ((cpu, residual.clone(), packed), (reference, residual.clone(), slow))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gates = torch.randn(5, 128)
    found = cpu.glu_linear(gates, "silu", packed, None, 48)
    expected = reference.glu_linear(gates, "silu", slow, None, 48)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 12}, "group_size: expected a multiple of 8, or at least the 64 inputs, found 12"),
        ({"group_size": 32}, "scales: expected shape"),
        ({"levels": NORMAL[:15]}, "levels"),
        ({"order": torch.full((64,), 64, dtype=torch.int32)}, "order: expected inputs below 64, found 64"),
        ({"order": torch.full((64,), -1, dtype=torch.int32)}, "order: expected inputs below 64, found -1"),
        ({"offsets": torch.zeros(2, 4, 32)}, "offsets: expected float16, found float32"),
        ({"codes": torch.zeros(2, 8, 2, 32, 4, dtype=torch.uint8)}, "codes: expected shape"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    packed = replace(cpu.pack_coded([matrix(40, 64, NORMAL, 16)]), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        cpu.linear_coded(torch.randn(1, 64), packed, None, 40)
