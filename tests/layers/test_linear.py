"""A layer from a weight, with biases in any float type."""

import pytest
import torch

from quire.layers.linear import linear_for


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bias_is_widened(dtype: str) -> None:
    weight, bias, x = torch.eye(8), torch.arange(8, dtype=torch.bfloat16), torch.randn(3, 8)
    torch.testing.assert_close(linear_for(weight.bfloat16(), bias, dtype)(x), x + bias.float())
    torch.testing.assert_close(linear_for(weight, None, dtype)(x), x)
