"""NoSampling: the sampler of a rank that computes its part of the logits and leaves sampling to rank 0."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from quire.kernels.transfer import Arrays
from quire.runner.cuda_graphs import Outcome
from quire.runner.results import Finish
from quire.runner.step_inputs import StepInputs
from quire.step import StepResult


class NoSampling:
    """Satisfies `StepSampler`. The result of a step stays empty."""

    waits = True

    def begin(self, step: StepInputs) -> Arrays:
        return {}

    def outcome(self, columns: Arrays) -> Outcome:
        return Outcome.LOGITS

    def compute(self, logits: Tensor, tensors: Mapping[str, Tensor], outcome: Outcome) -> Tensor:
        """The logits as they are: to make them, this rank took part."""
        return logits

    def finish(self, output: Tensor, step: StepInputs, result: StepResult) -> Sequence[Finish]:
        return ()

    def cancel(self) -> None:
        """Nothing runs beside the model."""
