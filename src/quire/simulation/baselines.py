"""BaselineSimulation: what the systems that the paper compares with have in common.

They reserve contiguous memory for a request when it starts, and preempt none. `orca.py` batches per iteration,
`fastertransformer.py` per request.

All requests of a batch advance by one token per iteration, so sums over the batch are kept instead of states of
requests, and an iteration costs the same whatever the batch.

Faults are those of `faults.py`. An engine that dies loses its memory; its requests come back before all others: Orca's
with the tokens that their clients have received as part of the prompt, FasterTransformer's from the start, since it
delivers nothing before the end.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from quire.simulation.arrivals import Arrival
from quire.simulation.faults import Faults
from quire.simulation.measures import Measures
from quire.simulation.settings import SimulationSettings
from quire.simulation.step_time import StepTime

Progress = Callable[[int], None]
"""Called now and then with the number of requests that have ended."""


class WaitingClient(NamedTuple):
    """A request that waits, in the state in which it would enter the batch now."""

    arrival: Arrival
    leaves: float | None
    """When its client loses patience and leaves; None: it stays. Patience counts from admission where the queue is
    always full."""
    num_received: int = 0
    """Tokens that an engine delivered before it died; part of the prompt now."""
    times: tuple[float, float] | None = None
    """When its latency began to count and when it got its first token, if it ran before."""

    @property
    def prompt_tokens(self) -> int:
        return self.arrival.row.prompt_tokens + self.num_received

    @property
    def output_tokens(self) -> int:
        return self.arrival.row.output_tokens - self.num_received


class BaselineSimulation(ABC):
    """Arrivals, sums over the batch, measures and faults; a subclass batches."""

    def __init__(
        self,
        arrivals: Iterator[Arrival],
        step_time: StepTime,
        measures: Measures,
        settings: SimulationSettings,
        *,
        num_slots: int,
        max_model_len: int,
    ) -> None:
        self.now = 0.0
        self.measures = measures
        self.num_deaths = 0
        self._arrivals = arrivals
        self._next = next(arrivals, None)
        self._step_time = step_time
        self._settings = settings
        self._faults = Faults(settings)
        self._num_slots = num_slots
        self._max_model_len = max_model_len
        self._num_samples = settings.num_sequences
        self._saturate = settings.saturate
        self._waiting: deque[WaitingClient] = deque()
        """The requests to look at next: those of an engine that died, and the first one that arrived."""
        self._num_counted = 0
        """Requests that wait or run and are part of the result."""
        self._running = 0
        """Sequences in the batch that have not ended."""
        self._tokens = 0
        """Tokens of those sequences: prompts and outputs so far."""
        self._final = 0
        """Tokens that those sequences will have when they end."""
        self._allocated = 0
        """Slots reserved, without what buddy allocation adds; ended sequences count while their slots are held."""

    @property
    def _is_over(self) -> bool:
        return not self._num_counted and (self._next is None or not self._next.counted)

    @property
    def _num_ended(self) -> int:
        measures = self.measures
        return measures.finished + measures.failed + measures.cancelled + measures.refused

    @abstractmethod
    def run(self, on_progress: Progress | None = None) -> None:
        """Run until every counted request has ended."""

    def result(self) -> dict[str, Any]:
        """The figures of the run."""
        figures = self.measures.result(self.now)
        return {**figures, "preemptions": 0, "prefix_hit_pct": 0.0, "engine_deaths": self.num_deaths}

    def _skip_to_arrival(self) -> None:
        assert self._next is not None
        self.now = max(self.now, self._next.time)

    def _first_waiting(self) -> WaitingClient | None:
        """The first waiting request that can run and whose client is there; requests before it end here."""
        waiting = self._waiting
        while True:
            if not waiting:
                arrival = self._next
                if arrival is None or arrival.time > self.now or not (arrival.counted or self._num_counted):
                    return None
                self._next = next(self._arrivals, None)
                patience = self._faults.patience()
                since = self.now if self._saturate else arrival.time
                waiting.append(WaitingClient(arrival, None if patience is None else since + patience))
                self._num_counted += arrival.counted
            client = waiting[0]
            if client.leaves is not None and client.leaves <= self.now:
                self.measures.cancelled += client.arrival.counted
            elif not self._can_run(client):
                self.measures.refused += client.arrival.counted
            else:
                return client
            waiting.popleft()
            self._num_counted -= client.arrival.counted

    def _can_run(self, client: WaitingClient) -> bool:
        return client.prompt_tokens + client.output_tokens <= self._max_model_len

    def _enter(self, client: WaitingClient, reserved: int) -> None:
        """Move the first waiting request into the batch."""
        self._waiting.popleft()
        samples = self._num_samples
        self._running += samples
        self._tokens += samples * client.prompt_tokens
        self._final += samples * (client.prompt_tokens + client.output_tokens)
        self._allocated += samples * reserved

    def _leave(self, client: WaitingClient, num_generated: int) -> None:
        """Take a request that has generated `num_generated` tokens out of the sums over the batch."""
        samples = self._num_samples
        self._running -= samples
        self._tokens -= samples * (client.prompt_tokens + num_generated)
        self._final -= samples * (client.prompt_tokens + client.output_tokens)

    def _iterate(self, num_new: int, prompt_tokens: int, prompt_pairs: float, num_idle: int = 0) -> None:
        """One iteration: `num_new` sequences compute their prompts, the others of the batch one token each, and
        `num_idle` sequences that have ended are computed for nothing."""
        running = self._running
        decoding = running - num_new + num_idle
        read = self._tokens
        seconds = self._faults.slowed(
            self._step_time.seconds(
                running + num_idle,
                decoding + prompt_tokens,
                read,
                read - prompt_tokens + prompt_pairs,
                running + num_idle,
            )
        )
        self.now += seconds
        tokens, final = self._tokens, self._final
        self._tokens = tokens + running
        measures = self.measures
        measures.num_tokens += running
        measures.step(self.now, seconds, running, tokens, final - tokens, self._allocated - final, self._allocated, 0)
        if running > num_new:
            measures.gaps.add(seconds, running - num_new)

    def _restart(self) -> None:
        """A new engine, with nothing in its memory."""
        self.num_deaths += 1
        self.now += self._settings.restart_time
        self._running = self._tokens = self._final = self._allocated = 0
