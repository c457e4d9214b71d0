"""SamplePoints: after which of a step's tokens samples are drawn, each from the state its sequence has there.

A sequence with drafted tokens is sampled after its last known token and after each drafted one, as if it had taken
them: the states there are forks. Which of these samples count is known when they are drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.sampling.state import SamplingState
from quire.step import StepPlan


@dataclass(frozen=True, slots=True)
class SamplePoints:
    """N samples, those of one sequence side by side."""

    states: list[SamplingState]
    """[N]"""
    tokens: NDArray[np.int32]
    """[N]: index of the step's token after which each is drawn."""
    first: list[int]
    """Index of each sequence's first sample, in the order of `StepPlan.sample_rows`, and N at the end."""
    after_every_token: bool
    """Whether the samples are one after every token of the step, in their order, as where all only decode."""


def make_sample_points(plan: StepPlan, states: list[SamplingState]) -> SamplePoints:
    """`states` are those of `plan.sample_rows`. A draft is followed as far as the sequence's grammar lets it."""
    last = np.cumsum(plan.counts, dtype=np.int32)[plan.sample_after] - np.int32(1)
    if not plan.drafts:
        decodes = plan.sample_after == list(range(plan.num_tokens))
        return SamplePoints(states, last, list(range(len(states) + 1)), decodes)
    all_states: list[SamplingState] = []
    tokens: list[int] = []
    first: list[int] = []
    for index, (state, token) in enumerate(zip(states, last.tolist(), strict=True)):
        first.append(len(tokens))
        draft = plan.drafts.get(index, [])
        all_states.append(state)
        tokens.append(token - len(draft))
        for place, token_id in enumerate(draft, start=1):
            if state.grammar is not None and not state.grammar.lets_follow(token_id):
                break
            state = state.fork()
            state.append(token_id)
            all_states.append(state)
            tokens.append(token - len(draft) + place)
    first.append(len(tokens))
    after_every_token = tokens == list(range(plan.num_tokens))
    return SamplePoints(all_states, np.array(tokens, dtype=np.int32), first, after_every_token)
