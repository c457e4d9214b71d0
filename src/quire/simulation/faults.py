"""Faults: what goes wrong in a simulation. All of it follows from one seed, so every failure can be reproduced."""

import random

from quire.simulation.settings import SimulationSettings
from quire.step import StepResult

FAULT = "a modelled fault"


class Faults:
    """Decides for each step and each client what goes wrong, by the probabilities in the settings."""

    def __init__(self, settings: SimulationSettings) -> None:
        self._settings = settings
        # A stream per kind: changing one probability does not change the faults of other kinds.
        seed = settings.seed
        self._failures, self._slow, self._deaths, self._clients = (
            random.Random(f"{kind} {seed}") for kind in ("failures", "slow", "deaths", "clients")
        )

    def kills_engine(self) -> bool:
        return self._settings.engine_deaths > 0 and self._deaths.random() < self._settings.engine_deaths

    def slowed(self, seconds: float) -> float:
        """The time of a step that takes `seconds` without a fault."""
        if self._settings.slow_steps > 0 and self._slow.random() < self._settings.slow_steps:
            return seconds * self._settings.slow_factor
        return seconds

    def fails_step(self) -> float | None:
        """The place, from 0 to less than 1, of the sequence for which a step fails; None if it does not fail."""
        probability = self._settings.step_failures
        if probability > 0 and self._failures.random() < probability:
            return self._failures.random()
        return None

    def fails_one(self, result: StepResult) -> bool:
        """Turn one of the step's samples into an error, or none. Returns whether it did."""
        place = self.fails_step() if result.errors else None
        if place is None:
            return False
        result.errors[int(place * len(result.errors))] = FAULT
        return True

    def patience(self) -> float | None:
        """Seconds after which the next client leaves; None if it stays."""
        if self._settings.cancellations > 0 and self._clients.random() < self._settings.cancellations:
            return self._clients.expovariate(1 / self._settings.patience)
        return None
