"""Faults: what goes wrong in a simulation, drawn from one seed, so that every failure can be met again."""

import random

from quire.simulation.settings import SimulationSettings
from quire.step import StepResult

FAULT = "a modelled fault"


class Faults:
    """Decides, step by step and client by client, by the probabilities of the settings."""

    def __init__(self, settings: SimulationSettings) -> None:
        self._settings = settings
        # A stream for each kind: raising one probability does not move the faults of the others.
        seed = settings.seed
        self._failures, self._slow, self._deaths, self._clients = (
            random.Random(f"{kind} {seed}") for kind in ("failures", "slow", "deaths", "clients")
        )

    def kills_engine(self) -> bool:
        return self._settings.engine_deaths > 0 and self._deaths.random() < self._settings.engine_deaths

    def slowed(self, seconds: float) -> float:
        """The time of a step that takes `seconds` when nothing is wrong."""
        if self._settings.slow_steps > 0 and self._slow.random() < self._settings.slow_steps:
            return seconds * self._settings.slow_factor
        return seconds

    def fails_step(self) -> float | None:
        """Whether a step fails for one of its sequences: at which place among them, from 0 to less than 1."""
        likely = self._settings.step_failures
        if likely > 0 and self._failures.random() < likely:
            return self._failures.random()
        return None

    def fails_one(self, result: StepResult) -> bool:
        """Perhaps turn one of the step's samples into an error; whether it did."""
        place = self.fails_step() if result.errors else None
        if place is None:
            return False
        result.errors[int(place * len(result.errors))] = FAULT
        return True

    def patience(self) -> float | None:
        """After how many seconds the next client leaves; None if it stays."""
        if self._settings.cancellations > 0 and self._clients.random() < self._settings.cancellations:
            return self._clients.expovariate(1 / self._settings.patience)
        return None
