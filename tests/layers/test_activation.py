"""Activations by name, plain and gated."""

import pytest
import torch
from torch.nn import functional

from quire.kernels import reference
from quire.layers.activation import activation, gated_activation


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_gated_is_plain_times_the_other_half(name: str) -> None:
    x = torch.randn(3, 10)
    expected = {
        "silu": functional.silu(x[:, :5]),
        "gelu": functional.gelu(x[:, :5]),
        "gelu_tanh": functional.gelu(x[:, :5], approximate="tanh"),
    }[name]
    torch.testing.assert_close(activation(name)(x[:, :5]), expected)
    torch.testing.assert_close(gated_activation(reference, name)(x), expected * x[:, 5:])
