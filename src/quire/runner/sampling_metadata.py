"""SamplingMetadata: after which of a step's tokens samples are drawn, each from the state its sequence has there.

A sequence with drafted tokens is sampled after its last known token and after each drafted one, as if it had taken
them: the states there are forks. Which of these samples count is known when they are drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.sampling.state import Draw, SamplingState
from quire.sampling.structured_output import GrammarState
from quire.step import StepPlan


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """N samples, those of one sequence side by side."""

    states: list[SamplingState]
    """[N]"""
    tokens: NDArray[np.int32]
    """[N]: index of the step's token after which each is drawn."""
    rows: NDArray[np.int32]
    """The row that each sequence's samples are drawn for, in the order of `StepPlan.sample_rows`."""
    first: list[int]
    """Index of each sequence's first sample, in the order of `StepPlan.sample_rows`, and N at the end."""
    after_every_token: bool
    """Whether the samples are one after every token of the step, in their order, as where all only decode."""
    grammars: list[GrammarState]
    """Those that any of the states follow."""
    outputs: list[list[int]] | None
    """[N]: the tokens of each state, where none of the states has more to remember; else None."""


def make_sample_points(plan: StepPlan, states: list[SamplingState]) -> SamplingMetadata:
    """`states` are those of `plan.sample_rows`. A draft is followed as far as the sequence's grammar lets it."""
    last = np.cumsum(plan.num_scheduled_tokens, dtype=np.int32)[plan.sample_indices] - np.int32(1)
    rows = np.array(plan.sample_rows, dtype=np.int32)
    if not plan.drafts:
        decodes = plan.sample_indices == list(range(plan.num_tokens))
        plain = all(state.is_stateless and state.draw is not Draw.BEAM for state in states)
        outputs = [state.output_token_ids for state in states] if plain else None
        return SamplingMetadata(states, last, rows, list(range(len(states) + 1)), decodes, _grammars(states), outputs)
    all_states: list[SamplingState] = []
    tokens: list[int] = []
    first: list[int] = []
    for index, (state, token) in enumerate(zip(states, last.tolist(), strict=True)):
        first.append(len(tokens))
        draft = plan.drafts.get(index, [])
        all_states.append(state)
        tokens.append(token - len(draft))
        for place, token_id in enumerate(draft, start=1):
            if state.grammar is not None and not state.grammar.allows(token_id):
                break
            state = state.fork()
            state.append(token_id)
            all_states.append(state)
            tokens.append(token - len(draft) + place)
    first.append(len(tokens))
    after_every_token = tokens == list(range(plan.num_tokens))
    return SamplingMetadata(
        all_states, np.array(tokens, dtype=np.int32), rows, first, after_every_token, _grammars(all_states), None
    )


def _grammars(states: list[SamplingState]) -> list[GrammarState]:
    return [state.grammar for state in states if state.grammar is not None]
