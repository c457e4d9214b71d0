"""Norms add the update to the residual stream first, in place."""

import pytest
import torch

from quire.kernels import reference
from quire.layers.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_of_the_updated_residual(kind: str) -> None:
    weight, bias = torch.randn(32), torch.randn(32)
    norm = RMSNorm(reference, weight, 1e-6) if kind == "rms" else LayerNorm(weight, bias, 1e-6)
    residual, update = torch.randn(5, 32), torch.randn(5, 32)
    total = residual + update
    alone = norm(total.clone())
    assert torch.equal(norm(residual, update), alone)
    assert torch.equal(residual, total)

    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    if kind == "layer":
        centred = total - total.mean(-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    torch.testing.assert_close(alone, expected)
