"""Planners of the backends: what turns a step's arrays on the host into the plan that one backend's attention reads.

A planner is made once, for a model and the limits of a batch, by the function that the backend's row in BACKENDS names.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quire.backends import BACKENDS
from quire.kernels.interface import AttentionPlan, Variant

Int32Array = NDArray[np.int32]

ADVANCED_KEYS = 32
"""A CPU goes on with a plan for so many keys at most: the loads that it balanced are about equal still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What does not change from step to step."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int
    """Most positions that any layer sees; 0: all."""
    max_num_seqs: int
    max_num_tokens: int
    """Of all sequences in a step."""
    max_blocks: int
    """Of one sequence."""
    num_threads: int
    kv_element_size: int
    """Bytes of a number in the cache."""
    batch_invariant: bool
    device: torch.device


class StepArrays(NamedTuple):
    """A step on the host, of B sequences with T new tokens, each sequence's last; all int32."""

    query_start_loc: Int32Array
    """[B + 1]: sequence s owns tokens query_start_loc[s] up to query_start_loc[s + 1]."""
    seq_lens: Int32Array
    """[B]: tokens whose KV is stored once this step has written its own."""
    block_tables: Int32Array
    """[B, most blocks of any]"""
    slots: Int32Array
    """[T]: where each token's KV goes, block * block_size + offset."""


class Planner(Protocol):
    """Plans one step."""

    def __call__(
        self,
        step: StepArrays,
        *,
        captured_tokens: int = 0,
        before: AttentionPlan | None = None,
        variant: Variant = (),
    ) -> AttentionPlan:
        """With `captured_tokens` > 0 the plan is for a captured step of so many tokens, of which the last need not be
        there, and of few of each sequence; only backends that capture are asked for such. A `variant` of AttentionPlan
        is asked for where a step without sequences is captured; else the planner chooses.

        `before` is the plan of the step before, where all sequences computed one token and now compute the one after
        it: a planner may go on with it, and overwrite it. The arrays are then those of that step, overwritten, but for
        tables that became wider.
        """
        ...


def make_planner(backend: str, shape: AttentionShape) -> Planner:
    """The planner of a backend of BACKENDS."""
    module, name = BACKENDS[backend].planner.split(":")
    made: Planner = getattr(import_module(module), name)(shape)
    return made


def cpu_planner(shape: AttentionShape) -> Planner:
    from quire.attention.plan import CpuAttentionPlan, advance_plan, plan_attention

    # A plan that began each of its parts for a reason of position is made anew.
    may_advance = not shape.window and not shape.batch_invariant

    def plan(
        step: StepArrays, *, captured_tokens: int = 0, before: AttentionPlan | None = None, variant: Variant = ()
    ) -> AttentionPlan:
        assert not captured_tokens, "a CPU has no graphs"
        if isinstance(before, CpuAttentionPlan) and may_advance and step.seq_lens[0] % ADVANCED_KEYS:
            return advance_plan(before, step.block_tables)
        return plan_attention(
            *step,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            num_threads=shape.num_threads,
            window=shape.window,
            kv_element_size=shape.kv_element_size,
            batch_invariant=shape.batch_invariant,
        )

    return plan


def sdpa_planner(shape: AttentionShape) -> Planner:
    from quire.attention.sdpa import plan_attention

    def plan(
        step: StepArrays, *, captured_tokens: int = 0, before: AttentionPlan | None = None, variant: Variant = ()
    ) -> AttentionPlan:
        assert not captured_tokens, "what is gathered differs from step to step"
        return plan_attention(
            *step,
            device=shape.device,
            block_size=shape.block_size,
            window=shape.window,
        )

    return plan


def gpu_planner(shape: AttentionShape) -> Planner:
    from quire.attention.triton import PlanBuffers, plan_attention

    buffers = PlanBuffers(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        max_num_seqs=shape.max_num_seqs,
        max_num_tokens=shape.max_num_tokens,
        max_blocks=shape.max_blocks,
        device=shape.device,
        kv_element_size=shape.kv_element_size,
    )

    def plan(
        step: StepArrays, *, captured_tokens: int = 0, before: AttentionPlan | None = None, variant: Variant = ()
    ) -> AttentionPlan:
        return plan_attention(
            *step,
            buffers=buffers,
            window=shape.window,
            captured_tokens=captured_tokens,
            variant=variant,
        )

    return plan
