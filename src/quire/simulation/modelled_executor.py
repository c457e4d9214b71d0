"""ModelledExecutor: takes the place of the runner. Executes a StepPlan without a model, and says how long it took."""

from operator import mul

from quire.simulation.step_time import StepTime
from quire.step import StepPlan, StepResult

SAMPLED_TOKEN = 1
"""What every sample draws; a sequence ends by its length."""


class ModelledExecutor:
    """The results of steps, and their times by a `StepTime`."""

    def __init__(self, step_time: StepTime) -> None:
        self._step_time = step_time

    def execute(self, plan: StepPlan) -> tuple[StepResult, float]:
        """What a runner would return, and the seconds it would take."""
        num_samples = len(plan.sample_rows)
        num_rows, num_tokens = len(plan.rows), len(plan.token_ids)
        context = sum(plan.starts) + num_tokens
        if num_tokens == num_rows:
            num_pairs: float = context
        else:
            # Token i of c after s earlier ones attends to s + i + 1 keys: c s + c (c + 1) / 2 for all of them.
            counts = plan.counts
            num_pairs = sum(map(mul, plan.starts, counts)) + (sum(map(mul, counts, counts)) + num_tokens) / 2
        seconds = self._step_time.seconds(num_rows, num_tokens, context, num_pairs, num_samples)
        nothing: list[None] = [None] * num_samples
        return StepResult([SAMPLED_TOKEN] * num_samples, [*nothing], [*nothing]), seconds
