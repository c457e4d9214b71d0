"""StepTotals: what all steps so far have computed."""

from dataclasses import dataclass


@dataclass(slots=True)
class StepTotals:
    """Written where results of steps are applied; policies and forecasts read it."""

    total_steps: int = 0
    total_prompt_tokens: int = 0
    """Prompt tokens computed, those of preempted requests each time."""
    total_generated_tokens: int = 0
