"""ExpertMLPs: what dense layers of each expert compute, from layers that are stored one by one or all in one tensor."""

import pytest
import torch
from torch import Tensor

from quire.kernels import Kernels, kernels_for, reference
from quire.layers.experts import ExpertLinear, ExpertMLPs
from quire.layers.linear import Linear, LinearWeight

HIDDEN, INNER, NUM_EXPERTS = 40, 24, 3


def stored(rows: int, columns: int, *, bias: bool) -> LinearWeight:
    return LinearWeight(torch.randn(rows, columns).bfloat16(), torch.randn(rows).bfloat16() if bias else None)


def expected(kernels: Kernels, parts: list[LinearWeight], down: LinearWeight, dtype: str, x: Tensor) -> Tensor:
    gate_up = Linear(kernels, parts, dtype)
    return Linear(kernels, [down], dtype).after_gate(gate_up(x), "silu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kernels", [reference, kernels_for("cpu")], ids=["reference", "cpu"])
def test_one_by_one(kernels: Kernels, dtype: str, bias: bool) -> None:
    gate_ups = [[stored(INNER, HIDDEN, bias=bias) for _ in range(2)] for _ in range(NUM_EXPERTS)]
    downs = [stored(HIDDEN, INNER, bias=bias) for _ in range(NUM_EXPERTS)]
    layers = ExpertLinear.of(gate_ups), ExpertLinear.of([[down] for down in downs])
    mlps = ExpertMLPs(kernels, *layers, INNER, "silu", dtype)
    x, weights = torch.randn(5, HIDDEN), torch.rand(5, 1)
    for index in range(NUM_EXPERTS):
        out = torch.zeros(5, HIDDEN)
        mlps.add_to(out, x, weights, torch.full((5, 1), index))
        alone = expected(kernels, gate_ups[index], downs[index], dtype, x) * weights
        assert (out - alone).norm() <= (1e-6 if dtype in ("float32", "bfloat16") else 1e-2) * alone.norm()


def test_one_tensor_of_all_experts_is_the_same() -> None:
    gate_up, down = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN, INNER)
    fused = ExpertLinear([[each] for each in gate_up]), ExpertLinear([[each] for each in down])
    halves = [[LinearWeight(half) for half in each.chunk(2)] for each in gate_up]
    apart = ExpertLinear.of(halves), ExpertLinear.of([[LinearWeight(each)] for each in down])
    x, weights, chosen = torch.randn(7, HIDDEN), torch.rand(7, 2), torch.tensor([[0, 2]] * 7)
    found = []
    for layers in (fused, apart):
        found.append(torch.zeros(7, HIDDEN))
        ExpertMLPs(kernels_for("cpu"), *layers, INNER, "gelu", "float32").add_to(found[-1], x, weights, chosen)
    assert torch.equal(*found)
