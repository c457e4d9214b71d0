"""Norms add the update to the residual stream first, in place."""

import pytest
import torch

from quire.kernels import reference
from quire.layers.norm import HeadNorm, JointHeadNorm, LayerHeadNorm, LayerNorm, NoNorm, RMSHeadNorm, RMSNorm


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_of_the_updated_residual(kind: str) -> None:
    weight, bias = torch.randn(32), torch.randn(32)
    norm = RMSNorm(reference, weight, 1e-6) if kind == "rms" else LayerNorm(reference, weight, bias, 1e-6)
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


@pytest.mark.parametrize("kind", ["rms", "layer", "layer with bias"])
def test_norms_of_heads_and_their_bounds(kind: str) -> None:
    heads, head_dim = 3, 16
    weight = torch.randn(head_dim) if kind == "rms" else torch.randn(heads, head_dim)
    bias = torch.randn(1, head_dim).sign() if kind == "layer with bias" else None
    norm: HeadNorm = RMSHeadNorm(reference, weight, 1e-6) if kind == "rms" else LayerHeadNorm(weight, 1e-6, bias)
    x = torch.randn(200, 2 * heads, head_dim) * 100
    x[:head_dim, :heads] = torch.eye(head_dim)[:, None]  # one element has all the length
    before = x.clone()
    norm(x[:, :heads])
    assert torch.equal(x[:, heads:], before[:, heads:]), "a view of a larger tensor"
    for head in range(heads):
        values = before[:, head]
        if kind != "rms":
            values = values - values.mean(-1, keepdim=True)
        expected = values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = expected * (weight if kind == "rms" else weight[head])
        torch.testing.assert_close(x[:, head], expected if bias is None else expected + bias)
    largest = x[:, :heads].abs().amax(0)
    assert bool((largest <= norm.bound).all())
    assert bool((largest > 0.5 * norm.bound).all())


def test_a_norm_of_all_heads_together_and_its_bound() -> None:
    heads, head_dim = 3, 16
    weight = torch.randn(heads * head_dim)
    norm = JointHeadNorm(reference, weight, 1e-6, head_dim)
    x = torch.randn(200, 2 * heads, head_dim) * 100
    x[: heads * head_dim, :heads] = torch.eye(heads * head_dim).view(-1, heads, head_dim)
    before = x.clone()
    norm(x[:, :heads])
    assert torch.equal(x[:, heads:], before[:, heads:]), "a view of a larger tensor"
    rows = before[:, :heads].flatten(1)
    expected = rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(x[:, :heads].flatten(1), expected)
    largest = x[:, :heads].abs().amax(0)
    assert bool((largest <= norm.bound).all())
    assert bool((largest > 0.99 * norm.bound).all())


def test_no_norm_is_the_updated_residual_itself() -> None:
    residual, update = torch.randn(5, 32), torch.randn(5, 32)
    total = residual + update
    found = NoNorm()(residual, update)
    assert found is residual
    assert torch.equal(found, total)
    assert NoNorm()(residual) is residual
