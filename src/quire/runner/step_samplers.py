"""How a step is sampled: on the host from its logits, or on the device as the last part of the step.

Both have the face of `StepSampler`, so the runner treats them alike:

    columns = sampler.begin(step)                     what sampling needs on the device
    output = sampler.compute(logits, tensors, …)      runs with the model, in a captured step too
    finishes = sampler.finish(output, step, result)   puts the samples into the result, now or when they are there
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quire.kernels.transfer import Arrays
from quire.runner.cuda_graphs import Outcome
from quire.runner.results import Finish, StepResults
from quire.runner.step_inputs import StepInputs
from quire.sampling.device_sampler import KERNEL_COLUMNS, DeviceSampler, can_sample_on_device
from quire.sampling.sampler import Sampler
from quire.sampling.structured_output import MaskWorker
from quire.step import StepResult


class StepSampler(Protocol):
    """The sampling of one step after the other."""

    waits: bool
    """True if `finish` reads the device's output at once, so that nothing of the step is pending afterwards."""

    def begin(self, step: StepInputs) -> Arrays:
        """Start what can be computed beside the model. Returns the columns that `compute` reads."""
        ...

    def outcome(self, columns: Arrays) -> Outcome:
        """What `compute` returns for a step with these columns."""
        ...

    def compute(self, logits: Tensor, tensors: Mapping[str, Tensor], outcome: Outcome) -> Tensor:
        """logits [N, vocab_size], the columns on the device -> the output that `finish` takes."""
        ...

    def finish(self, output: Tensor, step: StepInputs, result: StepResult) -> Sequence[Finish]:
        """Sample what is not sampled yet and fill `result`, or return what fills it. The output of a captured step
        ends with padding."""
        ...


class HostSampling:
    """Samples every kind of request on the host, when the logits are there."""

    waits = True

    def __init__(self, sampler: Sampler, masks: MaskWorker, results: StepResults, *, logits_are_ready: bool) -> None:
        """`logits_are_ready`: they are float32 and on the host."""
        self._sampler = sampler
        self._masks = masks
        self._results = results
        self._logits_are_ready = logits_are_ready

    def begin(self, step: StepInputs) -> Arrays:
        """Start to compute the grammars' masks; there are no columns."""
        if step.sampling.grammars:
            self._masks.start(step.sampling.grammars)
        return {}

    def outcome(self, columns: Arrays) -> Outcome:
        """Logits, whatever is asked for."""
        return Outcome.LOGITS

    def compute(self, logits: Tensor, tensors: Mapping[str, Tensor], outcome: Outcome) -> Tensor:
        """The logits as they are."""
        return logits

    def finish(self, output: Tensor, step: StepInputs, result: StepResult) -> Sequence[Finish]:
        """Sample, and fill `result`."""
        self._masks.join()
        sampling = step.sampling
        logits = output if len(output) == len(sampling.states) else output[: len(sampling.states)]
        logits = logits if self._logits_are_ready else logits.float().cpu()
        sampled = self._sampler.sample(logits, sampling.states, sampling.states_id)
        self._results.accept(step.plan, sampling, sampled, result)
        return ()

    def cancel(self) -> None:
        """The step failed: wait until nothing runs beside the model any more."""
        self._masks.join()


class DeviceSampling:
    """Samples on the device, which keeps the tokens for the next step. Nothing waits for them."""

    waits = False

    def __init__(self, sampler: DeviceSampler, max_num_seqs: int, results: StepResults, device: torch.device) -> None:
        self._sampler = sampler
        self._results = results
        self._no_row = np.int32(max_num_seqs)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        """[row]: the token last sampled for it; and one entry more for tokens that no step will ask for."""

    @property
    def padding(self) -> Mapping[str, np.generic]:
        """The columns of a captured step, with the values of a row that is not there."""
        return {**KERNEL_COLUMNS, "rows": self._no_row}

    def accepts(self, step: StepInputs) -> bool:
        """True if no sequence of the step needs more than the device can do."""
        return all(map(can_sample_on_device, step.sampling.states))

    def begin(self, step: StepInputs) -> Arrays:
        """The sampler's columns, and the row that each token is kept for."""
        sampling = step.sampling
        if not sampling.states:
            return {}
        # Which tokens of a draft are accepted is known on the host, before a next step computes any of them.
        rows = np.full(len(sampling.states), self._no_row) if step.plan.drafts else sampling.rows
        return {"rows": rows, **self._sampler.columns(sampling.states, sampling.states_id)}

    def outcome(self, columns: Arrays) -> Outcome:
        """Tokens, with log-probabilities if any row asks for them."""
        with_logprobs = bool(columns) and bool(columns["num_entries"].any())
        return Outcome.LOGPROBS if with_logprobs else Outcome.TOKENS

    def compute(self, logits: Tensor, tensors: Mapping[str, Tensor], outcome: Outcome) -> Tensor:
        """Sample, and keep the tokens for the step that computes them."""
        samples = self._sampler.sample(logits, tensors, with_logprobs=outcome is Outcome.LOGPROBS)
        self._last_tokens.index_copy_(0, tensors["rows"].long(), samples[0])
        return samples

    def finish(self, output: Tensor, step: StepInputs, result: StepResult) -> Sequence[Finish]:
        """Begin to copy the samples to the host."""
        return [self._results.accept_later(step.plan, step.sampling, output, result)]

    def fill_in(self, input_ids: Tensor) -> Tensor:
        """Token ids with `~row` replaced by the token last sampled for that row."""
        sampled = self._last_tokens.index_select(0, (~input_ids).clamp_(min=0))
        return torch.where(input_ids < 0, sampled, input_ids)
