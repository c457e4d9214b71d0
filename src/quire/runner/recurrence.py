"""Recurrence: plans the recurrent layers of each step, in a model that has them."""

from quire.attention.recurrence import plan_recurrence
from quire.kernels.recurrent_plan import RecurrentPlan
from quire.kv_cache.storage import KVCache
from quire.runner.step_inputs import StepInputs


class Recurrence:
    """Keeps the plan of the last step: one that repeats it has the same."""

    def __init__(self, kv_cache: KVCache) -> None:
        self._states = kv_cache.states
        self._device = kv_cache.device
        self._last: RecurrentPlan | None = None

    def plan(self, step: StepInputs) -> RecurrentPlan | None:
        """The plan of a step; None in a model without recurrent layers."""
        if self._states is None or (step.repeats and self._last is not None):
            return self._last
        self._last = plan_recurrence(
            step.batch.query_start_loc,
            step.plan.state_slots,
            step.plan.state_saves,
            conv_width=self._states.conv_width,
            device=self._device,
        )
        return self._last
