"""The CPU's planner: a step that repeats updates the last plan, for a limited number of steps, where that is right."""

from dataclasses import replace

import numpy as np
import pytest

from quire.attention import AttentionShape, StepArrays
from quire.attention.planners import MAX_REPEATS, CpuPlanner, GroupPlanner
from quire.kernels.interface import CpuAttentionPlan

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=32, block_size=16)


class Decode:
    """Steps of two sequences that decode."""

    def __init__(self, shape: AttentionShape = SHAPE) -> None:
        self.planner = CpuPlanner(shape)
        tables = np.arange(20, dtype=np.int32).reshape(2, 10)
        self.arrays = StepArrays(
            np.array([0, 1, 2], np.int32), np.array([40, 7], np.int32), tables, np.zeros(2, np.int32)
        )

    def step(self, *, repeats: bool = True) -> CpuAttentionPlan:
        np.add(self.arrays.seq_lens, 1, out=self.arrays.seq_lens)
        return self.planner(self.arrays, repeats=repeats)


def key_ends(plan: CpuAttentionPlan) -> list[int]:
    return sorted(plan.work[:, 6].tolist())


def test_a_step_that_repeats_updates_the_last_plan() -> None:
    decode = Decode()
    first = decode.step(repeats=False)
    for count in range(1, MAX_REPEATS + 1):
        plan = decode.step()
        assert plan is first
        assert key_ends(plan) == [8 + count, 41 + count]
    balanced = decode.step()
    assert balanced is not first, "the load is balanced again"
    assert key_ends(balanced) == [9 + MAX_REPEATS, 42 + MAX_REPEATS]
    assert decode.step() is balanced


def test_a_step_that_does_not_repeat_gets_a_plan_of_its_own() -> None:
    decode = Decode()
    assert decode.step(repeats=False) is not decode.step(repeats=False)


@pytest.mark.parametrize("window", [1, 8, 9, 30, 41, 42, 43, 60])
def test_a_plan_with_a_window_moves_its_first_keys(window: int) -> None:
    decode = Decode(replace(SHAPE, window=window))
    plan = decode.step(repeats=False)
    for _ in range(40):
        lengths = decode.arrays.seq_lens
        ranges = {(row[0], row[5], row[6]) for row in plan.work.tolist()}
        assert ranges == {(0, max(0, lengths[0] - window), lengths[0]), (1, max(0, lengths[1] - window), lengths[1])}
        plan = decode.step()


def test_groups_of_one_window_share_their_work() -> None:
    plan_groups = GroupPlanner("cpu", [SHAPE, replace(SHAPE, window=8), SHAPE])
    starts, lengths, tables, slots, _ = Decode().arrays
    steps = [StepArrays(starts, lengths, tables + 100 * group, slots + group) for group in range(3)]
    for repeats in (False, True, True):
        first, windowed, third = plan_groups(steps, repeats=repeats)
        assert isinstance(first, CpuAttentionPlan)
        assert isinstance(third, CpuAttentionPlan)
        assert third.work is first.work
        assert windowed.window == 8
        for group, plan in enumerate((first, windowed, third)):
            np.testing.assert_array_equal(plan.block_tables.numpy(), steps[group].block_tables)
            np.testing.assert_array_equal(plan.slots.numpy(), steps[group].slots)
        lengths += 1


def test_plans_that_split_by_position_are_not_updated() -> None:
    decode = Decode(replace(SHAPE, batch_invariant=True))
    first = decode.step(repeats=False)
    plan = decode.step()
    assert plan is not first
    assert key_ends(plan) == [9, 42]


def test_a_second_plan_of_the_step_is_not_updated_in_place_of_the_first() -> None:
    """The plan of a step's output tokens is made by the same planner."""
    decode = Decode()
    decode.step(repeats=False)
    starts, _, tables, slots, _ = decode.arrays
    decode.planner(StepArrays(starts[:2], decode.arrays.seq_lens[:1].copy(), tables[:1], slots[:1]))
    assert key_ends(decode.step()) == [9, 42]


def test_wider_tables_are_taken_over() -> None:
    decode = Decode()
    decode.step(repeats=False)
    wider = np.arange(22, dtype=np.int32).reshape(2, 11)
    decode.arrays = decode.arrays._replace(block_tables=wider)
    np.testing.assert_array_equal(decode.step().block_tables.numpy(), wider)
