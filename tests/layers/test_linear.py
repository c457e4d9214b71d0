"""One layer from several weights, with biases in any float type."""

import pytest
import torch

from quire.kernels import kernels_for, reference
from quire.layers.activation import activation_function
from quire.layers.linear import Linear, LinearWeight
from quire.layers.norm import LayerNorm, Norm, Normed, RMSNorm


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernels", [reference, kernels_for("cpu")], ids=["reference", "cpu"])
def test_side_by_side(kernels: object, dtype: str) -> None:
    weights = [torch.randint(-9, 9, (n, 20)).float() for n in (40, 3, 30)]
    bias, x = torch.arange(73, dtype=torch.bfloat16), torch.randn(5, 20).bfloat16().float()
    expected = torch.cat([x @ weight.T for weight in weights], dim=1)
    parts = [LinearWeight(weight, part) for weight, part in zip(weights, bias.split((40, 3, 30)), strict=True)]
    layer = Linear(kernels, parts, dtype)  # type: ignore[arg-type]  # a module satisfies the protocol
    assert layer.packed.dtype == getattr(torch, dtype)
    for weight in weights:
        weight.fill_(float("nan"))  # nothing of the argument is kept
    torch.testing.assert_close(layer(x), expected + bias.float(), rtol=1e-5, atol=1e-4)
    layer.bias = None
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("num_inputs", [1, 7, 20, 60, 101, 252])
def test_few_bits_of_any_width(num_inputs: int, dtype: str) -> None:
    """One scale for all inputs, though their number is no multiple of a kernel's step."""
    weight, x = torch.randn(33, num_inputs), torch.randn(3, num_inputs)
    found, expected = (
        Linear(kernels, [LinearWeight(weight)], dtype)(x)  # type: ignore[arg-type]
        for kernels in (kernels_for("cpu"), reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_what_comes_before_a_layer(dtype: str, activation: str) -> None:
    """Fused kernels equal the reference's separate operations; with few bits a value may round to the other side."""
    weight, scale = torch.randn(40, 64), torch.rand(64)
    residual, update, x = torch.randn(5, 64), torch.randn(5, 64), torch.randn(5, 128)
    results = []
    for kernels in (reference, kernels_for("cpu")):
        layer, stream = Linear(kernels, [LinearWeight(weight)], dtype), residual.clone()  # type: ignore[arg-type]
        norm = RMSNorm(kernels, scale, 1e-5)  # type: ignore[arg-type]
        first = layer(Normed(norm, stream, None))
        second = layer(Normed(norm, stream, update))
        results.append(torch.cat((first, second, layer.after_gate(x, activation))))
        torch.testing.assert_close(stream, residual + update)
        torch.testing.assert_close(first, layer(norm(residual)), rtol=1e-5, atol=1e-4)
    expected, found = results
    assert (found - expected).norm() < {"float32": 1e-5, "int8": 5e-3, "int4": 2e-2}[dtype] * expected.norm()


@pytest.mark.parametrize("kind", ["rms", "layer", "layer without bias"])
def test_any_norm_before_a_layer(kind: str) -> None:
    weight, scale, bias = torch.randn(40, 64), torch.rand(64), torch.randn(64)
    norm: Norm
    if kind == "rms":
        norm = RMSNorm(reference, scale, 1e-5)
    else:
        norm = LayerNorm(reference, scale, bias if kind == "layer" else None, 1e-5)
    residual, update = torch.randn(5, 64), torch.randn(5, 64)
    layer, stream = Linear(reference, [LinearWeight(weight)], "float32"), residual.clone()
    found = layer(Normed(norm, stream, update))
    torch.testing.assert_close(stream, residual + update)
    torch.testing.assert_close(found, norm(residual + update) @ weight.T)


def test_an_activation_without_a_fused_kernel() -> None:
    weight, x = torch.randn(40, 32), torch.randn(5, 64)
    layer = Linear(reference, [LinearWeight(weight)], "float32")
    expected = (activation_function("relu")(x[:, :32]) * x[:, 32:]) @ weight.T
    torch.testing.assert_close(layer.after_gate(x, "relu"), expected)


def test_parts_with_and_without_bias() -> None:
    bias = torch.randn(3)
    layer = Linear(reference, [LinearWeight(torch.ones(2, 4)), LinearWeight(torch.ones(3, 4), bias)], "float32")
    torch.testing.assert_close(layer(torch.zeros(1, 4))[0], torch.cat((torch.zeros(2), bias)))


def test_rows_in_another_order() -> None:
    stored = LinearWeight(torch.randn(4, 3), torch.randn(4))
    chosen = stored.select_rows(torch.tensor([2, 0]))
    assert torch.equal(chosen.weight, stored.weight[[2, 0]])
    assert stored.bias is not None
    assert chosen.bias is not None
    assert torch.equal(chosen.bias, stored.bias[[2, 0]])
    assert LinearWeight(stored.weight).select_rows(torch.tensor([1])).bias is None
