"""Activations by name."""

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from quire.layers.activation import activation_function
from quire.model_config.activation import DENSE_ACTIVATIONS


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


@pytest.mark.parametrize("name", DENSE_ACTIVATIONS)
def test_config_names_mean_what_they_mean_in_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(
        activation_function(DENSE_ACTIVATIONS[name])(x.clone()), ACT2FN[name](x), rtol=0, atol=2e-6
    )
