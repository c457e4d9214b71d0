"""The operations of recurrent layers against a float64 run of the reference, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.attention.recurrence import CHUNK, Save, plan_recurrence
from quire.kernels import cpu, recurrence, reference, sdpa
from quire.kernels.interface import StateLayer
from quire.kernels.recurrent_plan import RecurrentPlan

NUM_SLOTS, WIDTH, KEY_DIM, VALUE_DIM = 9, 4, 6, 10
NUM_CHANNELS = 7
TOLERANCE = 2e-4


@dataclass
class Inputs:
    """Random tokens of a step, and the states before it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    conv: Tensor
    recurrent: Tensor

    def tokens(self, first: int, end: int) -> "Inputs":
        parts = {name: getattr(self, name)[first:end] for name in ("x", "q", "k", "v", "log_decay")}
        beta = None if self.beta is None else self.beta[first:end]
        return Inputs(**parts, weight=self.weight, bias=self.bias, beta=beta, conv=self.conv, recurrent=self.recurrent)


def make_inputs(num_tokens: int, *, delta: bool = True, groups: int = 2, heads: int = 4, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    return Inputs(
        x=normal(num_tokens, NUM_CHANNELS),
        weight=normal(NUM_CHANNELS, WIDTH),
        bias=None if delta else normal(NUM_CHANNELS),
        q=unit(num_tokens, groups, KEY_DIM),
        k=unit(num_tokens, groups, KEY_DIM),
        v=normal(num_tokens, heads, VALUE_DIM),
        log_decay=-0.1 * normal(num_tokens, heads).exp(),
        beta=torch.sigmoid(normal(num_tokens, heads)) if delta else None,
        conv=normal(NUM_SLOTS, WIDTH - 1, NUM_CHANNELS),
        recurrent=normal(NUM_SLOTS, heads, KEY_DIM, VALUE_DIM),
    )


def plan_of(counts: Sequence[int], slots: Sequence[int], saves: Sequence[Save] = ()) -> RecurrentPlan:
    bounds = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return plan_recurrence(bounds, slots, saves, conv_width=WIDTH)


def run(kernels: ModuleType, inputs: Inputs, plan: RecurrentPlan, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of both operations, and both states after them."""

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    state = StateLayer(inputs.conv.to(dtype, copy=True), inputs.recurrent.to(dtype, copy=True))
    convolved = kernels.causal_conv(cast(inputs.x), cast(inputs.weight), cast(inputs.bias), state, plan)
    vectors = (cast(inputs.q), cast(inputs.k), cast(inputs.v), cast(inputs.log_decay), cast(inputs.beta))
    return [convolved, kernels.gated_delta_rule(*vectors, state, plan), state.conv, state.recurrent]


STEPS = {
    "one token": ([1], [4], []),
    "decoding": ([1, 1, 1], [4, 0, 8], []),
    "a chunk": ([CHUNK], [3], []),
    "odd chunks": ([2 * CHUNK + 1], [3], []),
    "mixed": ([1, 90, 1, 3, 64, 1], [5, 2, 0, 8, 1, 3], []),
    "saves": ([70, 1, 1, 5], [5, 2, 0, 8], [(0, 16, 1), (0, 66, 7), (1, 1, 3), (3, 5, 4)]),
    "drafts": ([3, 1, 4, 70], [0, 5, 6, 2], [(0, 1, 1), (0, 2, 3), (2, 1, 4), (2, 2, 7), (2, 3, 8)]),
    "a save at every token": ([3], [0], [(0, 1, 1), (0, 2, 2), (0, 3, 3)]),
}


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "plain"])
@pytest.mark.parametrize("step", STEPS)
def test_equals_the_loop_over_tokens(step: str, delta: bool) -> None:
    counts, slots, saves = STEPS[step]
    inputs, plan = make_inputs(sum(counts), delta=delta), plan_of(counts, slots, saves)
    expected = run(reference, inputs, plan, torch.float64)
    for found, wanted in zip(run(recurrence, inputs, plan, torch.float32), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE, rtol=0)
    for found, wanted in zip(run(recurrence, inputs, plan, torch.float64), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 3), (3, 3), (2, 6)])
def test_heads_share_keys(groups: int, heads: int) -> None:
    inputs, plan = make_inputs(5, groups=groups, heads=heads), plan_of([1, 4], [1, 0])
    expected = run(reference, inputs, plan, torch.float64)
    torch.testing.assert_close(run(recurrence, inputs, plan, torch.float64), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("cuts", [[1] * 150, [64, 64, 22], [1, 149], [100, 1, 1, 48], [17, 133]], ids=str)
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "plain"])
def test_a_sequence_may_be_cut_anywhere(cuts: list[int], delta: bool) -> None:
    inputs = make_inputs(150, delta=delta)
    whole = run(reference, inputs, plan_of([150], [2]), torch.float64)
    outputs, first = [], 0
    for count in cuts:
        part = inputs.tokens(first, first + count)
        *out, inputs.conv, inputs.recurrent = run(recurrence, part, plan_of([count], [2]), torch.float32)
        outputs.append(out)
        first += count
    found = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    for one, other in zip([*found, inputs.conv, inputs.recurrent], whole, strict=True):
        torch.testing.assert_close(one.double(), other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "plain"])
def test_a_draft_is_computed_to_the_bits_of_its_tokens_one_by_one(delta: bool) -> None:
    inputs = make_inputs(4, delta=delta)
    together = run(recurrence, inputs, plan_of([4], [2], [(0, 1, 0), (0, 2, 1), (0, 3, 3)]), torch.float32)
    for index, saved in enumerate((0, 1, 3, 2)):
        part = inputs.tokens(index, index + 1)
        *out, inputs.conv, inputs.recurrent = run(recurrence, part, plan_of([1], [2]), torch.float32)
        assert all(torch.equal(one, other[index : index + 1]) for one, other in zip(out, together[:2], strict=True))
        assert torch.equal(inputs.conv[2], together[2][saved])
        assert torch.equal(inputs.recurrent[2], together[3][saved])


def test_what_another_sequence_computes_is_never_read() -> None:
    counts, slots = [3, 1, 70], [0, 1, 2]
    inputs = make_inputs(74)
    alone = run(recurrence, inputs.tokens(3, 74), plan_of(counts[1:], slots[1:]), torch.float32)
    inputs.v[0] = inputs.k[0] = inputs.x[0] = inputs.log_decay[0] = float("nan")
    together = run(recurrence, inputs, plan_of(counts, slots), torch.float32)
    for found, expected in zip(together[:2], alone[:2], strict=True):
        torch.testing.assert_close(found[3:], expected, atol=1e-5, rtol=0)
    for found, expected in zip(together[2:], alone[2:], strict=True):
        torch.testing.assert_close(found[1:], expected[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernels", [cpu, sdpa])
def test_every_backend_has_them(kernels: ModuleType) -> None:
    assert kernels.causal_conv is recurrence.causal_conv
    assert kernels.gated_delta_rule is recurrence.gated_delta_rule
