"""Activations by name."""

import pytest
import torch
from torch.nn import functional

from quire.layers.activation import activation_function


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_by_name(name: str) -> None:
    x = torch.randn(3, 10)
    expected = {
        "silu": functional.silu(x),
        "gelu": functional.gelu(x),
        "gelu_tanh": functional.gelu(x, approximate="tanh"),
        "relu": functional.relu(x),
    }[name]
    torch.testing.assert_close(activation_function(name)(x), expected)
