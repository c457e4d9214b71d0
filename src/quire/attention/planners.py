"""Planners of the backends: each turns a step's arrays on the host into the plan that its backend's attention reads.

A planner is made once, for one model and the limits of a batch, by the function that BACKENDS names.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Protocol

import torch

from quire.attention.image_runs import Run, split_at_images
from quire.attention.inputs import AttentionShape, Int32Array, StepArrays
from quire.backends import BACKENDS
from quire.kernels.interface import AttentionPlan, CpuAttentionPlan, Variant

MAX_REPEATS = 32
"""Steps for which the CPU keeps a plan before it balances the load again."""


class Planner(Protocol):
    """Plans one step."""

    def __call__(
        self, step: StepArrays, *, repeats: bool = False, captured_tokens: int = 0, variant: Variant = ()
    ) -> AttentionPlan:
        """`repeats`: the step is the last one planned with one more token in each sequence, and that one also computed
        one token per sequence. Its arrays are those of the last step, updated in place; only `block_tables` may be
        another array, with more columns. A planner may update its last plan and return it.

        `captured_tokens` > 0: the plan is for a captured step with room for this many tokens and few tokens per
        sequence; the step may have fewer. Only backends that capture get it. `variant` is the `AttentionPlan.variant`
        to plan for when a step without sequences is captured.
        """
        ...


def make_planner(backend: str, shape: AttentionShape) -> Planner:
    """The planner of a backend of BACKENDS."""
    module, name = BACKENDS[backend].planner.split(":")
    made: Planner = getattr(import_module(module), name)(shape)
    return made


class GroupPlanner:
    """Plans a step for every KV group: the same tokens with other block tables, slots and windows."""

    def __init__(self, backend: str, shapes: Sequence[AttentionShape]) -> None:
        """`shapes` has one entry for each group."""
        self._shapes = shapes
        self._planners = [make_planner(backend, shape) for shape in shapes]
        self._alike = [list(shapes).index(shape) for shape in shapes]
        """For each group, the index of the first group with the same shape."""

    def __call__(
        self,
        steps: Sequence[StepArrays],
        *,
        repeats: bool = False,
        captured_tokens: int = 0,
        variant: Variant = (),
        images: Sequence[Run] = (),
    ) -> tuple[AttentionPlan, ...]:
        """The plan of each group; the arguments are those of `Planner`, `variant` that of `variant_of`; `images` are
        the tokens of images in the step."""
        plans: list[AttentionPlan] = []
        if images and self._shapes[0].image_tokens:
            steps = [split_at_images(step, images, shape) for step, shape in zip(steps, self._shapes, strict=True)]
        size = len(variant) // len(steps)
        for group, (step, plan_step) in enumerate(zip(steps, self._planners, strict=True)):
            plan = plans[self._alike[group]] if self._alike[group] < group else None
            if isinstance(plan, CpuAttentionPlan) and not plan.expanded:
                # On a CPU the work depends on lengths and windows alone. Groups of equal windows share it.
                plans.append(_with_tables(plan, step))
            else:
                own = variant[group * size : (group + 1) * size]
                plans.append(plan_step(step, repeats=repeats, captured_tokens=captured_tokens, variant=own))
        return tuple(plans)

    def plan_group(self, step: StepArrays, group: int) -> AttentionPlan:
        """The plan of one group alone, for a step that is not the one planned last."""
        return self._planners[group](step)


def variant_of(plans: Sequence[AttentionPlan]) -> Variant:
    """The variants of all groups, one after the other."""
    return tuple(part for plan in plans for part in plan.variant)


class CpuPlanner:
    """Plans for the CPU kernels. Updates its last plan for a step that repeats."""

    def __init__(self, shape: AttentionShape) -> None:
        from quire.attention.plan import advance_plan, num_advances, plan_attention

        self._plan, self._advance, self._num_advances = plan_attention, advance_plan, num_advances
        self._shape = shape
        # Such plans split keys by position, so one more token may need another split.
        self._may_advance = not shape.batch_invariant
        self._last: CpuAttentionPlan | None = None
        self._seq_lens: Int32Array | None = None
        """The array that `_last` was made from."""
        self._num_repeats = 0
        """How many more times `_last` may be advanced."""

    def __call__(
        self, step: StepArrays, *, repeats: bool = False, captured_tokens: int = 0, variant: Variant = ()
    ) -> CpuAttentionPlan:
        assert not captured_tokens, "a CPU has no graphs"
        # If the last step had a second plan, for its output tokens, `_last` is that plan and cannot be updated.
        last = self._last if repeats and step.seq_lens is self._seq_lens else None
        if last is not None and self._may_advance and self._num_repeats > 0:
            self._num_repeats -= 1
            plan = self._advance(last, step.block_tables)
        else:
            plan = self._plan(step, self._shape)
            self._num_repeats = min(MAX_REPEATS, self._num_advances(plan, step.seq_lens))
        self._last, self._seq_lens = plan, step.seq_lens
        return plan


def sdpa_planner(shape: AttentionShape) -> Planner:
    from quire.attention.sdpa import plan_attention

    def plan(
        step: StepArrays, *, repeats: bool = False, captured_tokens: int = 0, variant: Variant = ()
    ) -> AttentionPlan:
        assert not captured_tokens, "sdpa steps cannot be captured: their shapes differ from step to step"
        return plan_attention(step, shape)

    return plan


def gpu_planner(shape: AttentionShape) -> Planner:
    from quire.attention.plan_buffers import PlanBuffers
    from quire.attention.triton import plan_attention

    buffers = PlanBuffers(shape)

    def plan(
        step: StepArrays, *, repeats: bool = False, captured_tokens: int = 0, variant: Variant = ()
    ) -> AttentionPlan:
        return plan_attention(step, buffers, window=shape.window, captured_tokens=captured_tokens, variant=variant)

    return plan


def _with_tables(plan: CpuAttentionPlan, step: StepArrays) -> CpuAttentionPlan:
    """The same work over the blocks of another KV group."""
    return replace(plan, block_tables=torch.from_numpy(step.block_tables), slots=torch.from_numpy(step.slots))
