"""Products with weights of 8 and 4 bits: exact where the definition is exact, for every instruction set, and the same
in every batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import cpu, reference
from quire.kernels.interface import QuantizedWeight

FORMATS = [(8, 1 << 20), (8, 64), (4, 32), (4, 64), (4, 128), (4, 1 << 20)]
"""Bits and group size; the largest makes one group of all inputs."""
SHAPES = [
    (0, 5, 3),
    (1, 1, 1),
    (1, 1280, 768),
    (2, 33, 7),
    (3, 257, 100),
    (4, 64, 64),
    (5, 40, 129),
    (12, 70, 33),
    (13, 31, 300),
    (14, 64, 64),
    (15, 65, 65),
    (29, 40, 1000),
    (64, 260, 257),
    (130, 5, 512),
]
"""Rows, outputs, inputs."""


@pytest.fixture(params=cpu.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> object:
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)


def unpack(packed: QuantizedWeight, n: int, k: int) -> QuantizedWeight:
    """From the layout that csrc/linear_low_bit.h describes to that of `reference`."""
    stored = packed.values  # [panels, pairs of steps, 2 or 1, outputs, 4 inputs]
    if packed.bits == 4:
        stored = torch.cat((stored & 15, stored >> 4), dim=2)
    values = stored.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:n, :k].to(torch.int16)
    values = (values - (128 if packed.bits == 8 else 8)).to(torch.int8)
    return QuantizedWeight(
        values, packed.scales.transpose(1, 2).flatten(0, 1)[:n].contiguous(), packed.bits, packed.group_size
    )


def case(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + 1000 * n + k)
    weight = torch.randn(n, k, generator=generator)
    return torch.randn(m, k, generator=generator), weight, torch.randn(n, generator=generator)


def check(m: int, n: int, k: int, bits: int, group_size: int) -> None:
    x, weight, bias = case(m, n, k)
    packed = cpu.quantize_linear([weight], bits, group_size)
    plain = reference.quantize_linear([weight], bits, group_size)
    found = unpack(packed, n, k)
    assert torch.equal(found.values, plain.values)
    assert torch.equal(found.scales, plain.scales)
    for b in (bias, None):
        y = cpu.linear_quantized(x, packed, b, n)
        assert y.shape == (m, n)
        # Integers are exact; what is left is float32's rounding of scales, groups and bias.
        expected = reference.linear_quantized(x, plain, b, n).double()
        size = reference.linear_quantized(x.abs(), absolute(plain), None if b is None else b.abs(), n).double()
        assert ((y.double() - expected).abs() <= 1e-6 * size).all()


def absolute(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.values.abs(), weight.scales.abs(), weight.bits, weight.group_size)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_equal_the_reference(m: int, n: int, k: int, bits: int, group_size: int) -> None:
    check(m, n, k, bits, group_size)


@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 300), st.sampled_from(FORMATS))
@settings(max_examples=30)
def test_any_shape(m: int, n: int, k: int, stored: tuple[int, int]) -> None:
    check(m, n, k, *stored)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_saturate(bits: int, sign: int) -> None:
    """All products at their largest, for the longest sums a layer may have."""
    k = 1 << 17
    x, weight = torch.ones(3, k), torch.full((2, k), float(sign))
    x[1] = -1
    x[2, ::2] = -1
    packed = cpu.quantize_linear([weight], bits, k)
    expected = torch.tensor([k, -k, 0]).float()[:, None] * sign
    torch.testing.assert_close(cpu.linear_quantized(x, packed, None, 2), expected.expand(3, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [1, 2, 5, 14, 33])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 4096), (4, 64)])
def test_whole_numbers_are_exact(m: int, bits: int, group_size: int) -> None:
    """Inputs and weights that their scales represent exactly give exact sums."""
    generator = torch.Generator().manual_seed(m)
    n, k = 96, 512
    x = torch.randint(-127, 128, (m, k), generator=generator).float()
    x[:, 0] = 127  # the scale is one
    weight = torch.randint(-8, 8, (n, k), generator=generator).float()
    weight[:, ::32] = -8 if bits == 4 else 127
    packed = cpu.quantize_linear([weight], bits, group_size)
    assert torch.equal(cpu.linear_quantized(x, packed, None, n), (x.double() @ weight.double().T).float())


@pytest.mark.parametrize(("bits", "group_size"), [(8, 4096), (4, 64)])
def test_a_row_is_the_same_in_every_batch(bits: int, group_size: int) -> None:
    x, weight, bias = case(70, 200, 1000)
    packed = cpu.quantize_linear([weight], bits, group_size)
    whole = cpu.linear_quantized(x, packed, bias, 200)
    for rows in range(1, 31):
        for begin in (0, 39):
            part = x[begin : begin + rows]
            assert torch.equal(cpu.linear_quantized(part, packed, bias, 200), whole[begin : begin + rows])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_the_same_with_any_number_of_threads(num_threads: int) -> None:
    x, weight, bias = case(50, 300, 640)
    before = torch.get_num_threads()
    results = []
    for threads in (1, num_threads):
        torch.set_num_threads(threads)
        packed = cpu.quantize_linear([weight], 4, 64)
        results.append(cpu.linear_quantized(x, packed, bias, 300))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 4096), (4, 32)])
def test_weights_of_any_float_type_side_by_side(stored: str, bits: int, group_size: int) -> None:
    weights = [torch.randn(n, 75).to(getattr(torch, stored)) for n in (33, 4, 40)]
    found = unpack(cpu.quantize_linear(weights, bits, group_size), 77, 75)
    expected = reference.quantize_linear(weights, bits, group_size)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 254), (4, 1 / 8)])
def test_a_weight_is_off_by_no_more_than_its_grid(bits: int, share: float) -> None:
    """Half a step with 8 bits; with 4, a whole one for the end that has only seven steps."""
    weight = torch.randn(50, 96)
    weight[3], weight[4, 32:64] = 0, 1e-38
    found = unpack(cpu.quantize_linear([weight], bits, 32), 50, 96)
    restored = found.values.view(50, 3, 32) * found.scales[:, :, None]
    groups = weight.view(50, 3, 32)
    assert ((restored - groups).abs() <= groups.abs().amax(2, keepdim=True) * share * 1.0001 + 1e-37).all()
    assert not found.scales[3].any()


@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 17, 300])
def test_rows_in_8_bits_equal_the_reference(k: int) -> None:
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(k)) * torch.logspace(-25, 30, 9)[:, None]
    x[2], x[3] = 0, 1e-37
    x[4] = 2.5 * torch.arange(k)  # halves, after scaling, for some k
    values, scales = cpu.quantize_rows(x)
    expected_values, expected_scales = reference.quantize_rows(x)
    assert torch.equal(values, expected_values)
    assert torch.equal(scales, expected_scales)
    assert values[0].abs().max() == 127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 20, 40])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_others_alone(value: float, column: int) -> None:
    x, weight, _ = case(5, 40, 41)
    packed = cpu.quantize_linear([weight], 8, 4096)
    clean = cpu.linear_quantized(x, packed, None, 40)
    x[2, column] = value
    y = cpu.linear_quantized(x, packed, None, 40)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert torch.equal(cpu.quantize_rows(x)[1].isnan(), reference.quantize_rows(x)[1].isnan())


def test_rows_may_be_strided() -> None:
    x, weight, _ = case(9, 50, 24)
    packed = cpu.quantize_linear([weight], 4, 32)
    wide = torch.randn(9, 40)
    wide[:, 8:32] = x
    assert torch.equal(cpu.linear_quantized(wide[:, 8:32], packed, None, 50), cpu.linear_quantized(x, packed, None, 50))
    assert torch.equal(cpu.quantize_rows(wide[:, 8:32])[0], cpu.quantize_rows(x)[0])


def test_bad_arguments_are_named() -> None:
    weight = torch.zeros(50, 64)
    packed = cpu.quantize_linear([weight], 4, 32)
    with pytest.raises(ValueError, match=r"packed: expected shape \[any, 9, 1, 32, 4\], found \[2, 8, 1, 32, 4\]"):
        cpu.linear_quantized(torch.zeros(1, 65), packed, None, 50)
    with pytest.raises(ValueError, match=r"packed: expected shape \[3, any, any, any, any\]"):
        cpu.linear_quantized(torch.zeros(1, 64), packed, None, 65)
    with pytest.raises(ValueError, match=r"scales: expected shape \[2, 1, 32\], found \[2, 2, 32\]"):
        cpu.linear_quantized(torch.zeros(1, 64), QuantizedWeight(packed.values, packed.scales, 4, 64), None, 50)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 32, or at least the 64 inputs, found 48"):
        cpu.quantize_linear([weight], 4, 48)
    with pytest.raises(ValueError, match="bits: expected 8 or 4, found 16"):
        cpu.quantize_linear([weight], 16, 32)
    with pytest.raises(ValueError, match="expected at most 131072 inputs, found 131073"):
        cpu.quantize_linear([torch.zeros(1, (1 << 17) + 1)], 8, 1 << 20)
    with pytest.raises(ValueError, match="x: expected float32, found float64"):
        cpu.linear_quantized(torch.zeros(1, 64, dtype=torch.float64), packed, None, 50)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize(("n", "k"), [(70, 100), (1, 1), (400, 257)])
def test_rows_are_values_times_scales(n: int, k: int, bits: int, group_size: int) -> None:
    weight, ids = torch.randn(n, k), torch.randint(0, n, (200,), dtype=torch.int32)
    packed = cpu.quantize_linear([weight], bits, group_size)
    rows = cpu.gather_rows_quantized(packed, ids, k)
    assert torch.equal(rows, reference.gather_rows_quantized(unpack(packed, n, k), ids, k))
    assert cpu.gather_rows_quantized(packed, ids[:0], k).shape == (0, k)
    with pytest.raises(ValueError, match="ids: expected rows 0 to"):
        cpu.gather_rows_quantized(packed, ids - n, k)
