"""Experts compute what a loop over tokens computes, and a token's result is the same bits in every batch."""

import pytest
import torch
from torch import Tensor

from quire.kernels import kernels_for
from quire.layers.linear import Linear, LinearWeight
from quire.layers.norm import Normed, RMSNorm
from quire.models.blocks import GatedMLP
from quire.models.experts import Experts

HIDDEN, INNER = 32, 48
CPU = kernels_for("cpu")


def make(num_experts: int, num_active: int, *, normalise: bool = True, dtype: str = "float32") -> Experts:
    generator = torch.Generator().manual_seed(1)

    def linear(num_outputs: int, num_inputs: int, dtype: str) -> Linear:
        weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.3
        return Linear(CPU, [LinearWeight(weight)], dtype)

    mlps = [
        GatedMLP(linear(2 * INNER, HIDDEN, dtype), linear(HIDDEN, INNER, dtype), "silu") for _ in range(num_experts)
    ]
    return Experts(linear(num_experts, HIDDEN, "float32"), mlps, num_active, normalise=normalise)


def one_by_one(experts: Experts, x: Tensor) -> Tensor:
    rows = []
    for row in x[:, None]:
        shares = experts.router(row)[0].double().softmax(0)
        chosen = shares.argsort(descending=True)[: experts.num_active].tolist()
        total = shares[chosen].sum() if experts.normalise else 1.0
        rows.append(sum(experts.experts[index](row)[0] * shares[index] / total for index in chosen).float())
    return torch.stack(rows)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "num_active"), [(4, 2), (5, 3), (5, 1), (3, 3), (64, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_equal_a_loop_over_tokens(num_experts: int, num_active: int, normalise: bool, num_tokens: int) -> None:
    experts = make(num_experts, num_active, normalise=normalise)
    x = torch.randn(num_tokens, HIDDEN)
    torch.testing.assert_close(experts(x), one_by_one(experts, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_token_is_the_same_bits_in_every_batch(dtype: str) -> None:
    experts = make(5, 3, dtype=dtype)
    x = torch.randn(70, HIDDEN)
    together = experts(x)
    assert torch.equal(torch.cat([experts(row) for row in x.split(1)]), together)
    assert torch.equal(torch.cat([experts(rows) for rows in x.split(17)]), together)
    order = torch.randperm(len(x))
    assert torch.equal(experts(x[order]), together[order])


def test_of_a_norm_that_is_not_yet_computed() -> None:
    experts = make(4, 2)
    norm = RMSNorm(CPU, torch.rand(HIDDEN), 1e-6)
    residual, update = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN)
    expected = experts(norm(residual + update))
    stream = residual.clone()
    torch.testing.assert_close(experts(Normed(norm, stream, update)), expected)
    torch.testing.assert_close(stream, residual + update)
