"""One layer from several weights, with biases in any float type."""

import pytest
import torch

from quire.kernels import kernels_for, reference
from quire.layers.linear import Linear


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernels", [reference, kernels_for("cpu")], ids=["reference", "cpu"])
def test_side_by_side(kernels: object, dtype: str) -> None:
    weights = [torch.randint(-9, 9, (n, 20)).float() for n in (40, 3, 30)]
    bias, x = torch.arange(73, dtype=torch.bfloat16), torch.randn(5, 20)
    expected = torch.cat([x @ weight.T for weight in weights], dim=1)
    layer = Linear(kernels, weights, bias, dtype)  # type: ignore[arg-type]  # a module satisfies the protocol
    assert layer.packed.dtype == getattr(torch, dtype)
    for weight in weights:
        weight.fill_(float("nan"))  # nothing of the argument is kept
    torch.testing.assert_close(layer(x), expected + bias.float(), rtol=1e-5, atol=1e-4)
    layer.bias = None
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
