"""Activations by name."""

import pytest
import torch
from torch.nn import functional

from quire.layers.activation import activation


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activations_by_name(name: str) -> None:
    x = torch.randn(3, 10)
    expected = {
        "silu": functional.silu(x),
        "gelu": functional.gelu(x),
        "gelu_tanh": functional.gelu(x, approximate="tanh"),
    }[name]
    torch.testing.assert_close(activation(name)(x), expected)
