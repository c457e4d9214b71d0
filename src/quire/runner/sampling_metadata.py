"""SamplingMetadata: after which of a step's tokens to sample, and from which sequence's state.

A sequence with drafts is sampled after its last known token and after each draft token, as if the draft had been
accepted: the states of these samples are forks. Which samples count is known once they are made (`StepResults`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.sampling.state import SamplingMode, SamplingState
from quire.sampling.structured_output import GrammarState
from quire.step import StepPlan


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """N samples; those of one sequence stand side by side."""

    states: list[SamplingState]
    """[N]"""
    states_id: int
    """Non-zero: two steps with the same id have the very same `states`. What was built from them stays valid. 0: the
    states belong to this step alone."""
    tokens: NDArray[np.int32]
    """[N]: index of the step's token that each sample follows."""
    rows: NDArray[np.int32]
    """The row that each sequence's samples are for, in the order of `StepPlan.sample_rows`."""
    offsets: list[int]
    """Samples offsets[i] up to offsets[i + 1] are those of `StepPlan.sample_rows[i]`."""
    after_every_token: bool
    """True if there is one sample after every token of the step, in order, as when all sequences decode."""
    grammars: list[GrammarState]
    """The grammars of all states that have one."""
    outputs: list[list[int]] | None
    """[N]: the output of each state, if a new token changes nothing else of any state; otherwise None."""


def make_sampling_metadata(plan: StepPlan, states: list[SamplingState], states_id: int = 0) -> SamplingMetadata:
    """`states` are those of `plan.sample_rows`. A draft is sampled as far as the sequence's grammar allows it; a step
    with drafts has no `states_id`."""
    last = np.cumsum(plan.num_scheduled_tokens, dtype=np.int32)[plan.sample_indices] - np.int32(1)
    rows = np.array(plan.sample_rows, dtype=np.int32)
    if not plan.drafts:
        is_plain = all(state.is_stateless and state.mode is not SamplingMode.BEAM for state in states)
        return SamplingMetadata(
            states=states,
            states_id=states_id,
            tokens=last,
            rows=rows,
            offsets=list(range(len(states) + 1)),
            after_every_token=plan.sample_indices == list(range(plan.num_tokens)),
            grammars=_grammars(states),
            outputs=[state.output_token_ids for state in states] if is_plain else None,
        )
    all_states: list[SamplingState] = []
    tokens: list[int] = []
    offsets: list[int] = []
    for index, (state, token) in enumerate(zip(states, last.tolist(), strict=True)):
        offsets.append(len(tokens))
        draft = plan.drafts.get(index, [])
        all_states.append(state)
        tokens.append(token - len(draft))
        for num_accepted, token_id in enumerate(draft, start=1):
            if state.grammar is not None and not state.grammar.allows(token_id):
                break
            state = state.fork()
            state.append(token_id)
            all_states.append(state)
            tokens.append(token - len(draft) + num_accepted)
    offsets.append(len(tokens))
    return SamplingMetadata(
        states=all_states,
        states_id=0,
        tokens=np.array(tokens, dtype=np.int32),
        rows=rows,
        offsets=offsets,
        after_every_token=tokens == list(range(plan.num_tokens)),
        grammars=_grammars(all_states),
        outputs=None,
    )


def _grammars(states: list[SamplingState]) -> list[GrammarState]:
    return [state.grammar for state in states if state.grammar is not None]
