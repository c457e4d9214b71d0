"""StepInputs: a plan laid out as arrays and sampling metadata, and its way to the device.

Here alone it is decided whether a step repeats the one before: the plan's `batch_id` is compared with that of the last
step. If it repeats, the arrays are advanced in place and the sampling metadata stays; everyone else asks `repeats`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.attention import StepArrays
from quire.kernels.transfer import Arrays, send
from quire.runner.input_batch import InputBatch, Int32Array, make_input_batch
from quire.runner.output_selection import OutputSelection, select_outputs
from quire.runner.request_rows import RequestRows
from quire.runner.sampling_metadata import SamplingMetadata, make_sampling_metadata
from quire.sampling.state import SamplingState
from quire.step import StepPlan


@dataclass(slots=True)
class StepInputs:
    """One step on the host."""

    plan: StepPlan
    batch: InputBatch
    sampling: SamplingMetadata
    repeats: bool
    """True if this step is the one before with one more token per sequence. `batch` and `sampling` are then the objects
    of that step, and what was made from them is advanced instead of made again."""

    @property
    def arrays(self) -> Arrays:
        """What the model reads of every token, by the names of a captured step's inputs."""
        arrays = {"input_ids": self.batch.input_ids, "token_positions": self.batch.positions}
        return arrays if self.batch.token_types is None else {**arrays, "token_types": self.batch.token_types}

    @property
    def attention_arrays(self) -> list[StepArrays]:
        """What the attention planner reads, for each KV group."""
        batch = self.batch
        return [
            StepArrays(batch.query_start_loc, batch.seq_lens, table, slots)
            for table, slots in zip(batch.block_tables, batch.slots, strict=True)
        ]

    @property
    def image_runs(self) -> list[tuple[int, int]]:
        """The tokens of images: the first of each run, and how many they are."""
        images = self.plan.images
        return [] if images is None else [(placed.first_token, placed.num_rows) for placed in images.placed]

    def selected_arrays(self, selection: OutputSelection, group: int) -> StepArrays:
        """The same of the selected tokens alone, for the attention of the last layer, which is in KV group `group`."""
        batch, sequences = self.batch, selection.sequences
        return StepArrays(
            selection.query_start_loc,
            batch.seq_lens[sequences],
            batch.block_tables[group][sequences],
            batch.slots[group][selection.tokens],
        )


@dataclass(frozen=True, slots=True)
class SentInputs:
    """One step's arrays on the device."""

    tensors: Mapping[str, Tensor]
    """The step's arrays and the sampler's columns; `sampled`, the index of each sample's hidden state; and
    `output_tokens`, the tokens of `selection` (without a selection it is not used)."""
    selection: OutputSelection | None
    """None: hidden states of all tokens are computed."""
    sampled: Int32Array
    """`sampled` on the host."""

    def hidden_indices(self, tokens: Int32Array) -> Int32Array:
        """The row of the hidden states that belongs to each of these tokens of the step; all must be selected."""
        return tokens if self.selection is None else self.selection.indices_of(tokens)


class StepInputBuilder:
    """Lays out one step after the other and sends it."""

    def __init__(
        self, rows: RequestRows, block_size: int, device: torch.device, *, pools_all_tokens: bool = False
    ) -> None:
        """`pools_all_tokens`: a vector is made of the hidden states of all tokens of its text."""
        self._pools_all_tokens = pools_all_tokens
        self._rows = rows
        self._block_size = block_size
        self._device = device
        self._batch_id = 0
        """`batch_id` of the last step; 0: it cannot be repeated."""
        self._batch: InputBatch | None = None
        self._sampling: SamplingMetadata | None = None
        """Batch and sampling metadata of the last step."""
        self._sent: SentInputs | None = None
        """The last step's inputs on a CPU. Tensors share the arrays' memory there, so a repeated step sends nothing."""
        self._states: list[SamplingState] = []
        self._states_id = 0
        """The states sampled last, and their id. States also stay the same in steps that have no `batch_id`: sequences
        with log-probabilities or grammars."""

    def lay_out(self, plan: StepPlan) -> StepInputs:
        """A plan of at least one token, whose rows have been applied."""
        repeats = plan.batch_id != 0 and plan.batch_id == self._batch_id
        if repeats and self._batch is not None and self._sampling is not None:
            self._batch.advance(plan, self._rows, self._block_size)
            return StepInputs(plan, self._batch, self._sampling, repeats=True)
        self.clear()
        batch = make_input_batch(plan, self._rows, self._block_size)
        sampling = self._lay_out_sampling(plan)
        self._batch_id, self._batch, self._sampling = plan.batch_id, batch, sampling
        return StepInputs(plan, batch, sampling, repeats=False)

    def send(self, step: StepInputs, columns: Arrays) -> SentInputs:
        """Copy a step to the device, with the sampler's columns."""
        if step.repeats and self._sent is not None and not columns:
            return self._sent
        sampled = output_tokens = step.sampling.tokens
        selection = (
            None
            if step.repeats
            else select_outputs(step.plan, step.sampling, step.batch, pools_all_tokens=self._pools_all_tokens)
        )
        if selection is not None:
            sampled, output_tokens = selection.indices_of(sampled), selection.tokens
        arrays = {**step.arrays, **columns, "sampled": sampled, "output_tokens": output_tokens}
        sent = SentInputs(send(arrays, self._device), selection, sampled)
        self._sent = sent if self._device.type == "cpu" and not columns else None
        return sent

    def clear(self) -> None:
        """The next step repeats nothing: call this after a step that failed."""
        self._batch_id, self._batch, self._sampling, self._sent = 0, None, None, None

    def _lay_out_sampling(self, plan: StepPlan) -> SamplingMetadata:
        states = self._rows.sampling_states(plan.sample_rows)
        if plan.drafts:
            return make_sampling_metadata(plan, states)
        if states != self._states:  # compares objects, not their content
            self._states, self._states_id = states, self._states_id + 1
        return make_sampling_metadata(plan, states, self._states_id)
