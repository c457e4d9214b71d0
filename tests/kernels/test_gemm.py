"""Packed products equal plain ones in every shape, and plain ones take over where private operators fail."""

from collections.abc import Iterator

import pytest
import torch

from quire.kernels import gemm

SHAPES = [(64, 48), (33, 7), (1, 1), (260, 64), (5, 300)]


@pytest.fixture(autouse=True)
def fresh_self_tests() -> Iterator[None]:
    gemm.has_onednn.cache_clear()
    gemm.has_fbgemm.cache_clear()
    yield
    gemm.has_onednn.cache_clear()
    gemm.has_fbgemm.cache_clear()


def case(n: int, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * k + m)
    # Values that float16 and bfloat16 both hold exactly.
    weight = torch.randint(-128, 128, (n, k), generator=generator) / 256
    return weight, torch.randn(n, generator=generator), torch.randn(m, k, generator=generator)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("m", [0, 1, 2, 3, 17, 64, 200])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_equal_those_of_float64(n: int, k: int, m: int, dtype: str) -> None:
    weight, bias, x = case(n, k, m)
    for b in (bias, None):
        y = gemm.pack_linear(weight, b, dtype)(x)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert y.shape == (m, n)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_may_come_in_16_bits(stored: torch.dtype, dtype: str) -> None:
    weight, bias, x = case(64, 48, 5)
    y = gemm.pack_linear(weight.to(stored), bias, dtype)(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nothing_of_the_argument_is_kept(dtype: str) -> None:
    weight, bias, x = case(64, 48, 5)
    expected = torch.nn.functional.linear(x, weight, bias)
    product = gemm.pack_linear(weight, bias, dtype)
    weight.fill_(float("nan"))
    torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [65504.0, 1e30, float("inf"), float("nan")])
def test_what_float16_cannot_hold_stays_float32(value: float) -> None:
    weight, _, _ = case(8, 8, 1)
    weight[3, 4] = value
    product = gemm.pack_linear(weight, None, "bfloat16")
    assert not isinstance(product, gemm.FBGEMMLinear)
    x = torch.zeros(1, 8)
    x[0, 4] = 1
    torch.testing.assert_close(product(x), weight[:, 4].unsqueeze(0), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_plain_products_take_over_where_an_operator_is_missing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gemm.OneDNNLinear, "__init__", missing)
    monkeypatch.setattr(gemm.FBGEMMLinear, "__init__", missing)
    assert not gemm.has_onednn()
    assert not gemm.has_fbgemm()
    weight, bias, x = case(33, 7, 5)
    product = gemm.pack_linear(weight, bias, dtype)
    assert isinstance(product, gemm.PlainLinear)
    assert product.weight.dtype == getattr(torch, dtype)
    torch.testing.assert_close(product(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_plain_products_take_over_where_an_operator_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm.OneDNNLinear, "__call__", lambda self, x: torch.zeros(x.shape[0], 64))
    assert not gemm.has_onednn()
    weight, bias, _ = case(8, 8, 1)
    assert isinstance(gemm.pack_linear(weight, bias, "float32"), gemm.PlainLinear)
