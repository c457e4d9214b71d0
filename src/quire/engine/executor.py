"""Executor: runs the scheduler's plans for the engine. `ModelRunner` is one, in this process on one device.

`EngineCore` needs nothing else of a model, so an executor may also spread a plan over several ranks, or be a script.
"""

from typing import Protocol

from quire.step import StepPlan, StepResult


class PendingStep(Protocol):
    """A step that was launched and may still run on a device."""

    @property
    def ready(self) -> bool:
        """True if `result` returns without waiting."""
        ...

    def result(self) -> StepResult:
        """Wait for the step and return its result."""
        ...


class Executor(Protocol):
    """Runs plans in the order of the `launch` calls."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Begin a step. Raises `DeviceMemoryError` if the device lacks memory; then nothing of the step has happened.

        A second step may be launched before the result of the first is read.
        """
        ...

    def prepare(self, *, idle: bool) -> None:
        """Do work that speeds up later steps. `idle`: there is no step to run now."""
        ...

    @property
    def has_idle_work(self) -> bool:
        """True if `prepare(idle=True)` would do something."""
        ...

    def close(self) -> None:
        """Release files and threads. No call follows."""
        ...
