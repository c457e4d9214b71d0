"""Packed products: equal to float64 in every shape, dtype and instruction set, and the same in every batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import cpu, reference
from quire.kernels.interface import PackedWeight, QuantizedWeight
from quire.layers.activation import FUSED_ACTIVATIONS, FUSED_GATES, activation_function
from quire.quantization import METHODS, WeightFormat

DTYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture(params=cpu.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> object:
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)


def case(m: int, n: int, k: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + 1000 * n + k)
    weight = torch.randn(n, k, generator=generator).to(getattr(torch, dtype))
    return torch.randn(m, k, generator=generator), weight, torch.randn(n, generator=generator)


def multiplied(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """What is multiplied with weights of `dtype`: x, or x rounded where pairs of bfloat16 are multiplied."""
    return x.bfloat16().float() if dtype == "bfloat16" and cpu.isa() == "avx512bf16" else x


def check(m: int, n: int, k: int, dtype: str) -> None:
    x, weight, bias = case(m, n, k, dtype)
    packed = cpu.pack_linear([weight], dtype)
    for b in (bias, None):
        y = cpu.linear(x, packed, b, n)
        factor = multiplied(x, dtype).double()
        expected = torch.nn.functional.linear(factor, weight.double(), None if b is None else b.double())
        assert y.shape == (m, n)
        # One float32 sum of k products, each of size 1.
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 + 3e-7 * k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (0, 5, 3),
        (1, 1, 1),
        (1, 1280, 768),
        (2, 33, 7),
        (13, 31, 300),
        (14, 64, 64),
        (15, 65, 64),
        (64, 260, 257),
        (1, 40, 5000),
        (29, 40, 5000),
        (300, 5, 2048),
        (3, 4096, 20),
        (115, 200, 70),
    ],
)
def test_products_equal_those_of_float64(m: int, n: int, k: int, dtype: str) -> None:
    check(m, n, k, dtype)


@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 80), st.sampled_from(DTYPES))
@settings(max_examples=40)
def test_any_shape(m: int, n: int, k: int, dtype: str) -> None:
    check(m, n, k, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_every_batch(dtype: str) -> None:
    x, weight, bias = case(130, 200, 2500, dtype)
    packed = cpu.pack_linear([weight], dtype)
    whole = cpu.linear(x, packed, bias, 200)
    for begin, end in ((0, 1), (3, 9), (7, 39), (2, 120)):
        assert torch.equal(cpu.linear(x[begin:end], packed, bias, 200), whole[begin:end])


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_as_torch_rounds_them(stored: str, dtype: str) -> None:
    weight = torch.randn(70, 9).to(getattr(torch, stored))
    packed = cpu.pack_linear([weight[:33], weight[33:]], dtype)
    if dtype == "bfloat16":  # pairs of inputs lie side by side
        packed = packed.unflatten(1, (5, 2)).flatten(1).unflatten(1, (5, 32, 2)).transpose(2, 3).flatten(1, 2)
    unpacked = packed.transpose(1, 2).flatten(0, 1)
    assert torch.equal(unpacked[:70, :9], weight.to(getattr(torch, dtype)))
    assert not unpacked[70:].any()
    assert not unpacked[:, 9:].any()


def test_rows_may_be_strided(isa: str) -> None:
    x, weight, _ = case(9, 50, 24, "float32")
    packed = cpu.pack_linear([weight], "float32")
    wide = torch.randn(9, 40)
    wide[:, 8:32] = x
    assert torch.equal(cpu.linear(wide[:, 8:32], packed, None, 50), cpu.linear(x, packed, None, 50))


FORMATS: list[str | WeightFormat] = [*DTYPES, *(method.layers for method in METHODS.values())]


def pack(weight: torch.Tensor, stored: str | WeightFormat) -> PackedWeight:
    return cpu.pack_linear([weight], stored) if isinstance(stored, str) else cpu.quantize_linear([weight], stored)


def product(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor, n: int) -> torch.Tensor:
    if isinstance(packed, QuantizedWeight):
        return cpu.linear_quantized(x, packed, bias, n)
    return cpu.linear(x, packed, bias, n)


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 3), (1, 40, 100), (2, 33, 7), (15, 65, 257), (40, 96, 64)])
def test_the_norm_before_a_layer_is_the_same_with_it(m: int, n: int, k: int, stored: str | WeightFormat) -> None:
    x, weight, bias = case(m, n, k, "float32")
    packed, scale, update = pack(weight, stored), torch.rand(k), torch.randn(m, k)
    found = cpu.rms_norm_linear(x, None, scale, 1e-5, packed, bias, n)
    assert torch.equal(found, product(cpu.rms_norm(x, scale, 1e-5), packed, bias, n))

    residual, expected_residual = x.clone(), x.clone()
    found = cpu.rms_norm_linear(residual, update, scale, 1e-5, packed, bias, n)
    normed = cpu.add_rms_norm(update, expected_residual, scale, 1e-5)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(found, product(normed, packed, bias, n))


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 3), (1, 40, 100), (2, 33, 7), (15, 65, 257), (40, 96, 64)])
def test_the_gate_before_a_layer_is_the_same_with_it(
    m: int, n: int, k: int, activation: str, stored: str | WeightFormat
) -> None:
    _, weight, bias = case(m, n, k, "float32")
    x, packed = torch.randn(m, 2 * k + 8)[:, 8:], pack(weight, stored)
    gated = cpu.silu_and_mul(x) if activation == "silu" else cpu.gelu_and_mul(x, tanh=activation == "gelu_tanh")
    found = cpu.glu_linear(x, activation, packed, bias, n)
    assert torch.equal(found, product(gated, packed, bias, n))
    for begin, end in ((0, 1), (3, 9), (7, 39)):
        part = cpu.glu_linear(x[begin:end], activation, packed, bias, n)
        assert torch.equal(part, found[begin:end])


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@pytest.mark.parametrize("activation", sorted(FUSED_ACTIVATIONS))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 100), (15, 65, 257), (70, 96, 64)])
def test_the_activation_before_a_layer_is_the_same_with_it(
    m: int, n: int, k: int, activation: str, stored: str | WeightFormat
) -> None:
    """It equals torch's, and is a gate whose other half is 1."""
    _, weight, bias = case(m, n, k, "float32")
    x, packed = torch.randn(m, k + 8)[:, 8:], pack(weight, stored)
    found = cpu.activation_linear(x, activation, packed, bias, n)
    if activation in FUSED_GATES:
        assert torch.equal(found, cpu.glu_linear(torch.cat([x, torch.ones(m, k)], 1), activation, packed, bias, n))
    expected = product(activation_function(activation)(x), packed, bias, n)
    assert (found - expected).norm() <= (1e-6 if isinstance(stored, str) else 5e-3) * expected.norm()
    for begin, end in ((0, 1), (3, 9), (7, 39)):
        assert torch.equal(cpu.activation_linear(x[begin:end], activation, packed, bias, n), found[begin:end])


@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_what_a_layer_is_made_of_is_checked(stored: str | WeightFormat) -> None:
    packed = pack(torch.zeros(50, 24), stored)
    with pytest.raises(ValueError, match=r"residual: expected shape \[2, 24\], found \[3, 24\]"):
        cpu.rms_norm_linear(torch.zeros(3, 24), torch.zeros(2, 24), torch.ones(24), 1e-5, packed, None, 50)
    with pytest.raises(ValueError, match=r"norm_weight: expected shape \[24\], found \[23\]"):
        cpu.rms_norm_linear(torch.zeros(2, 24), None, torch.ones(23), 1e-5, packed, None, 50)
    with pytest.raises(ValueError, match="x: expected two halves of columns, found 47"):
        cpu.glu_linear(torch.zeros(2, 47), "silu", packed, None, 50)
    with pytest.raises(ValueError, match="op: no input is made by 'plain_tanh'"):
        cpu.activation_linear(torch.zeros(2, 24), "tanh", packed, None, 50)
    with pytest.raises(ValueError, match="op: no input is made by 'tanh'"):
        cpu.glu_linear(torch.zeros(2, 48), "tanh", packed, None, 50)


def test_bad_arguments_are_named() -> None:
    packed = cpu.pack_linear([torch.zeros(50, 24)], "float32")
    with pytest.raises(ValueError, match=r"packed: expected shape \[2, 25, 32\], found \[2, 24, 32\]"):
        cpu.linear(torch.zeros(1, 25), packed, None, 50)
    with pytest.raises(ValueError, match=r"bias: expected shape \[50\], found \[49\]"):
        cpu.linear(torch.zeros(1, 24), packed, torch.zeros(49), 50)
    with pytest.raises(ValueError, match="x: expected float32, found float64"):
        cpu.linear(torch.zeros(1, 24, dtype=torch.float64), packed, None, 50)
    with pytest.raises(ValueError, match="weight: expected float32, float16 or bfloat16, found int32"):
        cpu.pack_linear([torch.zeros(5, 5, dtype=torch.int32)], "float32")


@given(st.integers(1, 70), st.integers(1, 50), st.sampled_from(DTYPES), st.data())
@settings(max_examples=30)
def test_rows_come_out_as_they_were_packed(n: int, k: int, dtype: str, data: st.DataObject) -> None:
    weight = torch.randn(n, k)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=9)), dtype=torch.int32)
    rows = cpu.gather_rows(cpu.pack_linear([weight], dtype), ids, weight.shape[1])
    assert rows.dtype == torch.float32
    assert torch.equal(rows, reference.gather_rows(reference.pack_linear([weight], dtype), ids, weight.shape[1]))


@pytest.mark.parametrize("form", [*DTYPES, "int8", "int4"])
def test_two_threads_pack_the_bytes_that_one_does(form: str) -> None:
    """Of two matrices whose border lies inside a panel."""
    weights = [torch.randn(rows, 257) for rows in (300, 77)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        if form in DTYPES:
            found.append([cpu.pack_linear(weights, form)])
        else:
            packed = cpu.quantize_linear(weights, METHODS[form].layers)
            found.append([packed.values, packed.scales])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_rows_of_a_large_table_are_gathered_by_several_threads() -> None:
    table, ids = torch.randn(1000, 257), torch.randint(0, 1000, (400,), dtype=torch.int32)
    assert torch.equal(cpu.gather_rows(cpu.pack_linear([table], "float32"), ids, table.shape[1]), table[ids])


@pytest.mark.parametrize("wrong", [-1, 64, 2**31 - 1])
def test_rows_outside_the_table_are_refused(wrong: int) -> None:
    packed = cpu.pack_linear([torch.ones(40, 3)], "float32")
    with pytest.raises(ValueError, match=f"ids: expected rows 0 to 63, found {wrong}"):
        cpu.gather_rows(packed, torch.tensor([0, wrong], dtype=torch.int32), 3)
