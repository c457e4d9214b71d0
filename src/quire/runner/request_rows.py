"""RequestRows: what the runner remembers of every running sequence.

A sequence keeps its row for as long as it runs. A preempted sequence loses its row; when it resumes it arrives as a new
one with all its tokens. So no second copy of its state has to be kept in step.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quire.grammar.cache import GrammarCache
from quire.sampling.state import SamplingState
from quire.sampling.structured_output import GrammarState
from quire.step import NewRow, RowFork, StepPlan


class RequestRows:
    """Block tables as one int32 array [KV groups, max_num_seqs, max_blocks], and a sampling state per row."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_blocks: int,
        vocab_size: int,
        num_groups: int = 1,
        grammars: GrammarCache | None = None,
        fast_forward: bool = True,
    ) -> None:
        """`fast_forward`: tokens that a grammar forces are added without running the model."""
        self.block_tables: NDArray[np.int32] = np.zeros((num_groups, max_num_seqs, max_blocks), dtype=np.int32)
        self.second_texts: NDArray[np.int32] = np.zeros(max_num_seqs, dtype=np.int32)
        """`NewRow.second_text` of each row."""
        self.states: list[SamplingState | None] = [None] * max_num_seqs
        self.adapter_slots: NDArray[np.int32] = np.full(max_num_seqs, -1, dtype=np.int32)
        """The slot of each row's adapter; −1: the model alone."""
        self.slot_of: Callable[[str], int] = lambda adapter: -1
        """Adapter → its slot."""
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._fast_forward = fast_forward

    @property
    def num_groups(self) -> int:
        """KV groups."""
        return len(self.block_tables)

    def tables_of(self, group: int, rows: NDArray[np.int32] | list[int], num_blocks: int) -> NDArray[np.int32]:
        """The first `num_blocks` entries of the tables of some rows in a KV group, as an array of its own."""
        return np.ascontiguousarray(self.block_tables[group, rows, :num_blocks])

    def apply(self, plan: StepPlan) -> None:
        """Apply a plan's forks, new rows and changed block tables. Plans carry everything else that they need."""
        # All forks are made before any row is written: a row may be the source of one fork and the target of another.
        beams = [(fork, self._source_state(fork), self.adapter_slots[fork.source]) for fork in plan.row_forks]
        for fork, state, slot in beams:
            state.append(fork.token_id)
            self.states[fork.row], self.adapter_slots[fork.row] = state, slot
        for new in plan.new_rows:
            self.adapter_slots[new.row] = self.slot_of(new.adapter)
            self.second_texts[new.row] = new.second_text
            self.states[new.row] = SamplingState(
                params=new.params,
                prompt_token_ids=new.prompt_token_ids,
                output_token_ids=new.output_token_ids,
                seed=new.seed,
                sample_index=new.sample_index,
                stop_token_ids=new.stop_token_ids,
                vocab_size=self._vocab_size,
                grammar=self._grammar_state(new),
            )
        for row, group, first, blocks in plan.new_blocks:
            if len(blocks) == 1:  # the usual case, in half the time of a slice
                self.block_tables[group, row, first] = blocks[0]
            else:
                # Kernels may look up a block that the group does not hold beside one that they read, so it must exist.
                self.block_tables[group, row, first : first + len(blocks)] = np.maximum(blocks, 0)

    def _source_state(self, fork: RowFork) -> SamplingState:
        state = self.states[fork.source]
        assert state is not None, "a plan forks a row that was never announced"
        return state if fork.row == fork.source else state.fork()

    def sampling_states(self, rows: list[int]) -> list[SamplingState]:
        """The states of the rows that are sampled in this step."""
        states = [self.states[row] for row in rows]
        assert all(state is not None for state in states), "a plan samples a row that was never announced"
        return states  # type: ignore[return-value]  # checked above

    def _grammar_state(self, new: NewRow) -> GrammarState | None:
        """The sequence's place in its grammar, which was compiled before the sequence was scheduled."""
        params = new.params
        if params.structured_outputs is None:
            return None
        grammar = self._grammars and self._grammars.find(params.structured_outputs)
        if not grammar:
            return GrammarState(None, error="the grammar of structured_outputs is not compiled")
        # Bans, biases, processors and log-probabilities of single tokens only work if the model runs for each token.
        needs_each_token = (
            params.logprobs is not None or params.logit_bias or params.bad_words_token_ids or params.logits_processors
        )
        return GrammarState(
            grammar,
            new.output_token_ids,
            fast_forwards=self._fast_forward and not needs_each_token and params.allowed_token_ids is None,
            banned_ids=grammar.eos_token_ids if params.ignore_eos else (),
        )
