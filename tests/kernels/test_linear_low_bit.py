"""Products with weights of 8 and 4 bits: exact where the definition is exact, for every instruction set, and the same
in every batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import cpu, reference
from quire.kernels.interface import QuantizedWeight
from quire.quantization import METHODS, WeightFormat

INT8, INT4 = METHODS["int8"].layers, METHODS["int4"].layers
ALL = 1 << 20
"""Makes one group of all inputs."""
FORMATS = [INT8, WeightFormat(8, 32), WeightFormat(8, ALL), INT4, WeightFormat(4, 128), WeightFormat(4, ALL)]
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
    if packed.stored.bits == 4:
        stored = torch.cat((stored & 15, stored >> 4), dim=2)
    values = stored.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:n, :k].to(torch.int16)
    values = (values - (128 if packed.stored.bits == 8 else 0)).to(torch.int8)
    scales = packed.scales
    if packed.stored.bits == 4:
        units = scales[:, :2].reshape(len(scales), 1, -1).view(torch.bfloat16).unflatten(2, (-1, 2))
        scales = scales[:, 2:] * units.float()
    return QuantizedWeight(values, scales.float().transpose(1, 2).flatten(0, 1)[:n].contiguous(), packed.stored)


def case(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + 1000 * n + k)
    weight = torch.randn(n, k, generator=generator)
    return torch.randn(m, k, generator=generator), weight, torch.randn(n, generator=generator)


def check_weight(found: QuantizedWeight, weights: list[torch.Tensor]) -> None:
    """What was quantised is what the reference makes of it. With 4 bits two candidates may be as good as each other,
    and sums in another order then choose another: the numbers must be those of the chosen scales, and no worse."""
    expected = reference.quantize_linear(weights, found.stored)
    if found.stored.bits == 8:
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.scales, expected.scales)
        return
    weight, (n, k) = torch.cat([part.float() for part in weights]), found.values.shape
    size = min(found.stored.group_size, k)
    offset, scale = found.scales.repeat_interleave(size, dim=1)[:, :k].unbind(2)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    assert torch.equal(found.values, ((weight - offset) * inverse).round().clamp(0, 15).to(torch.int8))
    if (
        k >= found.stored.group_size and found.scales.numel() >= 256
    ):  # of a few short groups, many candidates are as good
        assert (found.scales == expected.scales).float().mean() > 0.8
    ids, groups = torch.arange(n, dtype=torch.int32), weight.split(size, dim=1)
    importance = torch.cat([group.abs() + group.square().mean(1, keepdim=True).sqrt() for group in groups], dim=1)
    errors = [
        (importance * (reference.gather_rows_quantized(each, ids, k) - weight).square()).sum()
        for each in (found, expected)
    ]
    assert errors[0] <= 1.05 * errors[1] + 1e-4 * (importance * weight.square()).sum()


def check(m: int, n: int, k: int, stored: WeightFormat) -> None:
    x, weight, bias = case(m, n, k)
    packed = cpu.quantize_linear([weight], stored)
    plain = unpack(packed, n, k)
    check_weight(plain, [weight])
    for b in (bias, None):
        y = cpu.linear_quantized(x, packed, b, n)
        assert y.shape == (m, n)
        # Integers are exact; what is left is float32's rounding of scales, groups and bias.
        expected = reference.linear_quantized(x, plain, b, n).double()
        size = reference.linear_quantized(x.abs(), absolute(plain), None if b is None else b.abs(), n).double()
        assert ((y.double() - expected).abs() <= 1e-6 * size).all()


def absolute(weight: QuantizedWeight) -> QuantizedWeight:
    stored = WeightFormat(weight.stored.bits, weight.stored.group_size)
    return QuantizedWeight(weight.values.abs(), weight.scales.abs(), stored)


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_equal_the_reference(m: int, n: int, k: int, stored: WeightFormat) -> None:
    check(m, n, k, stored)


@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 300), st.sampled_from(FORMATS))
@settings(max_examples=30)
def test_any_shape(m: int, n: int, k: int, stored: WeightFormat) -> None:
    check(m, n, k, stored)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_saturate(bits: int, sign: int) -> None:
    """All products at their largest, for the longest sums a layer may have."""
    k = 1 << 17
    x, weight = torch.ones(3, k), torch.full((2, k), float(sign))
    x[1] = -1
    x[2, ::2] = -1
    packed = cpu.quantize_linear([weight], WeightFormat(bits, k))
    each = cpu.gather_rows_quantized(packed, torch.tensor([0], dtype=torch.int32), k)[0, 0]
    assert each == pytest.approx(sign, rel=4e-3)
    expected = torch.tensor([k, -k, 0]).float()[:, None] * each
    torch.testing.assert_close(cpu.linear_quantized(x, packed, None, 2), expected.expand(3, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [1, 2, 5, 14, 33])
@pytest.mark.parametrize("stored", [WeightFormat(8, 4096), WeightFormat(8, 64), WeightFormat(4, 64), INT4], ids=str)
def test_whole_numbers_are_exact(m: int, stored: WeightFormat) -> None:
    """Inputs and weights that their scales represent exactly give exact sums."""
    generator = torch.Generator().manual_seed(m)
    n, k = 96, 512
    x = torch.randint(-127, 128, (m, k), generator=generator).float()
    x[:, ::32] = 127  # the scales are one
    weight = torch.randint(-8, 8, (n, k), generator=generator).float()
    weight[:, ::32] = -8 if stored.bits == 4 else 127
    weight[:, 1::32] = 7
    packed = cpu.quantize_linear([weight], stored)
    assert torch.equal(cpu.linear_quantized(x, packed, None, n), (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("stored", [INT8, INT4, WeightFormat(8, 4096)], ids=str)
def test_a_row_is_the_same_in_every_batch(stored: WeightFormat) -> None:
    x, weight, bias = case(70, 200, 1000)
    packed = cpu.quantize_linear([weight], stored)
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
        packed = cpu.quantize_linear([weight], INT4)
        results.append(cpu.linear_quantized(x, packed, bias, 300))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [INT8, INT4], ids=str)
def test_weights_of_any_float_type_side_by_side(dtype: str, stored: WeightFormat) -> None:
    weights = [torch.randn(n, 75).to(getattr(torch, dtype)) for n in (33, 4, 40)]
    check_weight(unpack(cpu.quantize_linear(weights, stored), 77, 75), weights)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_off_by_no_more_than_its_grid(bits: int) -> None:
    """Half a step with 8 bits; with 4, a whole one at the ends of a range that the search has made shorter."""
    weight = torch.randn(50, 96)
    weight[3], weight[4, 32:64] = 0, 1e-38
    packed = cpu.quantize_linear([weight], WeightFormat(bits, 32))
    restored = cpu.gather_rows_quantized(packed, torch.arange(50, dtype=torch.int32), 96).view(50, 3, 32)
    groups = weight.view(50, 3, 32)
    span = groups.amax(2, keepdim=True).clamp(min=0) - groups.amin(2, keepdim=True).clamp(max=0)
    step = groups.abs().amax(2, keepdim=True) / 127 / 2 * 1.01 if bits == 8 else span / 13
    assert ((restored - groups).abs() <= step + 1e-37).all()
    assert not restored[3].any()


@pytest.mark.parametrize("stored", [INT8, WeightFormat(8, 32)], ids=str)
def test_an_outlier_costs_only_its_group(stored: WeightFormat) -> None:
    """One input is a thousand times the others; one group for all inputs loses them."""
    x, weight, _ = case(4, 64, 512)
    x[:, 3] *= 1000
    weight[:, 3] = 0
    expected = x @ weight.T
    errors = []
    for each in (stored, WeightFormat(8, ALL)):
        y = cpu.linear_quantized(x, cpu.quantize_linear([weight], each), None, 64)
        errors.append(((y - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.35
    assert errors[1] > 2 * errors[0]


def test_a_rotation_is_undone() -> None:
    """Rotated rows of a weight come back, and a product is the same but for rounding."""
    x, weight, _ = case(5, 40, 200)
    weight[:, ::50] *= 100
    packed = cpu.quantize_linear([weight], INT8)
    rows = cpu.gather_rows_quantized(packed, torch.arange(40, dtype=torch.int32), 200)
    assert (rows - weight).norm() < 0.01 * weight.norm()
    expected = x @ weight.T
    assert (cpu.linear_quantized(x, packed, None, 40) - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(ValueError, match="group_size: expected 64, what a rotation mixes, found 32"):
        cpu.quantize_linear([weight], WeightFormat(8, 32, rotates=True))


@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 17, 64, 300])
@pytest.mark.parametrize(("group_size", "rotates"), [(ALL, False), (32, False), (64, True)])
def test_rows_in_8_bits_equal_the_reference(k: int, group_size: int, rotates: bool) -> None:
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(k)) * torch.logspace(-25, 30, 9)[:, None]
    x[2], x[3] = 0, 1e-37
    x[4] = 2.5 * torch.arange(k)  # halves, after scaling, for some k
    values, scales = cpu.quantize_groups(x, group_size, rotates)
    expected_values, expected_scales = reference.quantize_groups(x, group_size, rotates)
    assert torch.equal(values, expected_values)
    assert torch.equal(scales, expected_scales)
    assert values[0].abs().max() == 127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 20, 40])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_others_alone(value: float, column: int) -> None:
    x, weight, _ = case(5, 40, 41)
    packed = cpu.quantize_linear([weight], INT8)
    clean = cpu.linear_quantized(x, packed, None, 40)
    x[2, column] = value
    y = cpu.linear_quantized(x, packed, None, 40)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert torch.equal(cpu.quantize_groups(x, 32)[1].isnan(), reference.quantize_groups(x, 32)[1].isnan())


def test_rows_may_be_strided() -> None:
    x, weight, _ = case(9, 50, 24)
    packed = cpu.quantize_linear([weight], INT4)
    wide = torch.randn(9, 40)
    wide[:, 8:32] = x
    assert torch.equal(cpu.linear_quantized(wide[:, 8:32], packed, None, 50), cpu.linear_quantized(x, packed, None, 50))
    assert torch.equal(cpu.quantize_groups(wide[:, 8:32], 32)[0], cpu.quantize_groups(x, 32)[0])


def test_bad_arguments_are_named() -> None:
    weight = torch.zeros(50, 64)
    packed = cpu.quantize_linear([weight], INT4)
    with pytest.raises(ValueError, match=r"packed: expected shape \[any, 9, 1, 32, 4\], found \[2, 8, 1, 32, 4\]"):
        cpu.linear_quantized(torch.zeros(1, 65), packed, None, 50)
    with pytest.raises(ValueError, match=r"packed: expected shape \[3, any, any, any, any\]"):
        cpu.linear_quantized(torch.zeros(1, 64), packed, None, 65)
    wrong = QuantizedWeight(packed.values, packed.scales, WeightFormat(4, 64))
    with pytest.raises(ValueError, match=r"scales: expected shape \[2, 3, 32, 2\], found \[2, 4, 32, 2\]"):
        cpu.linear_quantized(torch.zeros(1, 64), wrong, None, 50)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 32, or at least the 64 inputs, found 48"):
        cpu.quantize_linear([weight], WeightFormat(4, 48))
    with pytest.raises(ValueError, match="bits: expected 8 or 4, found 16"):
        cpu.quantize_linear([weight], WeightFormat(16, 32))
    with pytest.raises(ValueError, match="expected at most 131072 inputs, found 131073"):
        cpu.quantize_linear([torch.zeros(1, (1 << 17) + 1)], WeightFormat(8, ALL))
    with pytest.raises(ValueError, match="x: expected float32, found float64"):
        cpu.linear_quantized(torch.zeros(1, 64, dtype=torch.float64), packed, None, 50)


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(70, 100), (1, 1), (400, 257)])
def test_rows_are_values_times_scales(n: int, k: int, stored: WeightFormat) -> None:
    weight, ids = torch.randn(n, k), torch.randint(0, n, (200,), dtype=torch.int32)
    packed = cpu.quantize_linear([weight], stored)
    rows = cpu.gather_rows_quantized(packed, ids, k)
    assert torch.equal(rows, reference.gather_rows_quantized(unpack(packed, n, k), ids, k))
    assert cpu.gather_rows_quantized(packed, ids[:0], k).shape == (0, k)
    with pytest.raises(ValueError, match="ids: expected rows 0 to"):
        cpu.gather_rows_quantized(packed, ids - n, k)
