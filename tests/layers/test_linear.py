"""One layer from several weights, with biases in any float type."""

import pytest
import torch

from quire.kernels import kernels_for, reference
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernels", [reference, kernels_for("cpu")], ids=["reference", "cpu"])
def test_side_by_side(kernels: object, dtype: str) -> None:
    weights = [torch.randint(-9, 9, (n, 20)).float() for n in (40, 3, 30)]
    bias, x = torch.arange(73, dtype=torch.bfloat16), torch.randn(5, 20).bfloat16().float()
    expected = torch.cat([x @ weight.T for weight in weights], dim=1)
    layer = Linear(kernels, weights, bias, dtype)  # type: ignore[arg-type]  # a module satisfies the protocol
    assert layer.packed.dtype == getattr(torch, dtype)
    for weight in weights:
        weight.fill_(float("nan"))  # nothing of the argument is kept
    torch.testing.assert_close(layer(x), expected + bias.float(), rtol=1e-5, atol=1e-4)
    layer.bias = None
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_what_comes_before_a_layer(dtype: str, activation: str) -> None:
    """As the reference has it, one operation after the other; with few bits a value may fall beside a half."""
    weight, scale = torch.randn(40, 64), torch.rand(64)
    residual, update, x = torch.randn(5, 64), torch.randn(5, 64), torch.randn(5, 128)
    results = []
    for kernels in (reference, kernels_for("cpu")):
        layer, stream = Linear(kernels, [weight], None, dtype), residual.clone()  # type: ignore[arg-type]
        norm = RMSNorm(kernels, scale, 1e-5)  # type: ignore[arg-type]
        first = layer.after_norm(norm, stream, None)
        second = layer.after_norm(norm, stream, update)
        results.append(torch.cat((first, second, layer.after_gate(x, activation))))
        torch.testing.assert_close(stream, residual + update)
        torch.testing.assert_close(first, layer(norm(residual)), rtol=1e-5, atol=1e-4)
    expected, found = results
    assert (found - expected).norm() < (1e-5 if dtype == "float32" else 5e-3) * expected.norm()
