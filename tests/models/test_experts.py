"""Experts compute what a loop over tokens computes, and a token's result is the same bits in every batch."""

import pytest
import torch
from torch import Tensor

from quire.kernels import kernels_for
from quire.layers.experts import ExpertLinear, ExpertMLPs
from quire.layers.linear import Linear, LinearWeight
from quire.layers.norm import Normed, RMSNorm
from quire.models.blocks import GatedMLP
from quire.models.experts import Experts
from quire.models.routers import SoftmaxTopK

HIDDEN, INNER = 32, 48
CPU = kernels_for("cpu")


def make(
    num_experts: int, num_active: int, *, normalise: bool = True, dtype: str = "float32", shared: int = 0, gate: int = 0
) -> tuple[Experts, list[GatedMLP]]:
    """Experts, and the MLP of each. `shared` is the width of a shared MLP, `gate` 1 if it has a gate."""
    generator = torch.Generator().manual_seed(1)

    def weight(num_outputs: int, num_inputs: int) -> LinearWeight:
        return LinearWeight(torch.randn(num_outputs, num_inputs, generator=generator) * 0.3)

    def mlp(gate_up: LinearWeight, down: LinearWeight) -> GatedMLP:
        return GatedMLP(Linear(CPU, [gate_up], dtype), Linear(CPU, [down], dtype), "silu")

    gate_up = [weight(2 * INNER, HIDDEN) for _ in range(num_experts)]
    down = [weight(HIDDEN, INNER) for _ in range(num_experts)]
    layers = [ExpertLinear.of([[each] for each in weights]) for weights in (gate_up, down)]
    experts = Experts(
        Linear(CPU, [weight(num_experts + gate, HIDDEN)], "float32"),
        SoftmaxTopK(num_active, normalise=normalise),
        ExpertMLPs(CPU, *layers, INNER, "silu", dtype),
        shared=mlp(weight(2 * shared, HIDDEN), weight(HIDDEN, shared)) if shared else None,
    )
    return experts, [mlp(*each) for each in zip(gate_up, down, strict=True)]


def one_by_one(experts: Experts, mlps: list[GatedMLP], x: Tensor) -> Tensor:
    router = experts.router
    assert isinstance(router, SoftmaxTopK)
    rows = []
    for row in x[:, None]:
        logits = experts.logits(row)[0].double()
        gate = logits[len(mlps) :].sigmoid().tolist() or [1.0]
        shares = logits[: len(mlps)].softmax(0)
        chosen = shares.argsort(descending=True)[: router.num_active].tolist()
        total = shares[chosen].sum() if router.normalise else 1.0
        out = sum(mlps[index](row)[0] * shares[index] / total for index in chosen).float()
        rows.append(out if experts.shared is None else out + gate[0] * experts.shared(row)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "num_active"), [(4, 2), (5, 3), (5, 1), (3, 3), (64, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_equal_a_loop_over_tokens(num_experts: int, num_active: int, normalise: bool, num_tokens: int) -> None:
    experts, mlps = make(num_experts, num_active, normalise=normalise)
    x = torch.randn(num_tokens, HIDDEN)
    torch.testing.assert_close(experts(x), one_by_one(experts, mlps, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_a_shared_mlp_sees_every_token(num_tokens: int, gate: int) -> None:
    experts, mlps = make(5, 2, shared=40, gate=gate)
    x = torch.randn(num_tokens, HIDDEN)
    torch.testing.assert_close(experts(x), one_by_one(experts, mlps, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("shared", "gate"), [(0, 0), (32, 0), (32, 1)])
def test_a_token_is_the_same_bits_in_every_batch(dtype: str, shared: int, gate: int) -> None:
    experts, _ = make(5, 3, dtype=dtype, shared=shared, gate=gate)
    x = torch.randn(70, HIDDEN)
    together = experts(x)
    assert torch.equal(torch.cat([experts(row) for row in x.split(1)]), together)
    assert torch.equal(torch.cat([experts(rows) for rows in x.split(17)]), together)
    order = torch.randperm(len(x))
    assert torch.equal(experts(x[order]), together[order])


def test_of_a_norm_that_is_not_yet_computed() -> None:
    experts, _ = make(4, 2)
    norm = RMSNorm(CPU, torch.rand(HIDDEN), 1e-6)
    residual, update = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN)
    expected = experts(norm(residual + update))
    stream = residual.clone()
    torch.testing.assert_close(experts(Normed(norm, stream, update)), expected)
    torch.testing.assert_close(stream, residual + update)
