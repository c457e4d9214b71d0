"""The systems the paper compares with: contiguous memory reserved per request when it starts, no preemption.

Orca (Yu et al. 2022) batches per iteration: after each one, finished requests leave and waiting ones enter in order
of arrival, as long as the first of them gets its whole reservation; those behind it wait with it. FasterTransformer
batches per request: a batch runs until its longest output ends, and all its answers leave together.

A reservation is for prompt p and output o, and never more than the context length:
Max the context length, Pow2 p + the next power of two of o, Oracle p + o. Memory comes from a `BuddyAllocator`.

All requests of a batch advance by one token per iteration, so sums over the batch are kept instead of states of
requests, and an iteration costs the same whatever the batch.

Faults are those of `faults.py`. An engine that dies loses its memory; its requests come back before all others, Orca's
with the tokens that their clients have as part of the prompt, FasterTransformer's, which have none, from the start.
"""

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from quire.simulation.arrivals import Arrival
from quire.simulation.buddy import BuddyAllocator
from quire.simulation.faults import Faults
from quire.simulation.invariants import check_buddy
from quire.simulation.measures import Measures
from quire.simulation.settings import SimulationSettings
from quire.simulation.step_time import StepTime

Progress = Callable[[int], None]


def reserved_slots(kind: str, prompt: int, output: int, max_model_len: int) -> int:
    """Slots that a policy reserves for a request."""
    if kind == "orca-pow2":
        return min(max_model_len, prompt + (1 << (output - 1).bit_length()))
    if kind == "orca-oracle":
        return prompt + output
    return max_model_len


class _Client(NamedTuple):
    """A request that waits, as it would enter now."""

    arrival: Arrival
    leaves: float | None
    """When its client has lost patience; None: it stays. Counted from admission where the queue is always full."""
    num_received: int = 0
    """Tokens that an engine which died had delivered; part of the prompt now."""
    times: tuple[float, float] | None = None
    """From when its latency counts, and when it got its first token, if it ran before."""

    @property
    def prompt_tokens(self) -> int:
        return self.arrival.row.prompt_tokens + self.num_received

    @property
    def output_tokens(self) -> int:
        return self.arrival.row.output_tokens - self.num_received


class BaselineSimulation(ABC):
    """What both ways of batching share: the arrivals, the sums over the batch, the measures, the faults."""

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
        self._waiting: deque[_Client] = deque()
        """Requests of an engine that died, and the first of those that arrived: what is looked at next."""
        self._num_counted = 0
        """Requests taken in that are part of the result and have not ended."""
        self._running = 0
        """Sequences in the batch that have not ended."""
        self._tokens = 0
        """Their tokens: prompts and what was generated."""
        self._final = 0
        """Their tokens when they end."""
        self._allocated = 0
        """Slots reserved, without what buddy allocation adds; those of ended sequences while they are held."""

    @property
    def _is_over(self) -> bool:
        return not self._num_counted and (self._next is None or not self._next.counted)

    @property
    def _num_ended(self) -> int:
        measures = self.measures
        return measures.finished + measures.failed + measures.cancelled + measures.refused

    @abstractmethod
    def run(self, on_progress: Progress | None = None) -> None:
        """Until every counted request has ended."""

    def result(self) -> dict[str, Any]:
        """The figures of the run."""
        figures = self.measures.result(self.now)
        return {**figures, "preemptions": 0, "prefix_hit_pct": 0.0, "engine_deaths": self.num_deaths}

    def _skip_to_arrival(self) -> None:
        assert self._next is not None
        self.now = max(self.now, self._next.time)

    def _look(self) -> _Client | None:
        """The first waiting request; those that can never run, and those whose client has left, end on the way."""
        waiting = self._waiting
        while True:
            if not waiting:
                arrival = self._next
                if arrival is None or arrival.time > self.now or not (arrival.counted or self._num_counted):
                    return None
                self._next = next(self._arrivals, None)
                patience = self._faults.patience()
                since = self.now if self._saturate else arrival.time
                waiting.append(_Client(arrival, None if patience is None else since + patience))
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

    def _can_run(self, client: _Client) -> bool:
        return client.prompt_tokens + client.output_tokens <= self._max_model_len

    def _enter(self, client: _Client, reserved: int) -> None:
        """The first waiting request becomes part of the batch."""
        self._waiting.popleft()
        samples = self._num_samples
        self._running += samples
        self._tokens += samples * client.prompt_tokens
        self._final += samples * (client.prompt_tokens + client.output_tokens)
        self._allocated += samples * reserved

    def _leave(self, client: _Client, num_generated: int) -> None:
        """A request of the batch, which has got `num_generated` tokens in it, computes no more."""
        samples = self._num_samples
        self._running -= samples
        self._tokens -= samples * (client.prompt_tokens + num_generated)
        self._final -= samples * (client.prompt_tokens + client.output_tokens)

    def _iterate(self, num_new: int, prompt_tokens: int, prompt_pairs: float, num_idle: int = 0) -> None:
        """One iteration: `num_new` sequences compute their prompts, the others of the batch one token each.

        `num_idle` sequences that have ended are computed for nothing.
        """
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


@dataclass(slots=True)
class _Running:
    """A request in Orca's batch."""

    client: _Client
    entered: int
    """Iterations before it came."""
    reserved: int
    chunks: list[tuple[int, int]]
    start: float
    first_token: float = field(default=-1.0)


class OrcaSimulation(BaselineSimulation):
    """Iteration-level batching; the policy says what is reserved."""

    _memory: BuddyAllocator
    _batch: dict[int, _Running]
    """By the number of the request."""
    _ends: list[tuple[int, int]]
    """(iteration at whose end a request ends, its number), a heap; those that ended before are still in it."""
    _leaving: list[tuple[float, int]]
    """(when its client leaves, number of the request), a heap."""
    _blocked: bool
    """Whether the first waiting request did not fit, and nothing has left since."""

    def run(self, on_progress: Progress | None = None) -> None:
        """Until every counted request has ended."""
        settings, faults = self._settings, self._faults
        self._start_engine()
        iteration = 0
        while True:
            self._cancel(iteration)
            if self._is_over:
                break
            entered = self._admit(iteration)
            if not self._batch:
                if not self._is_over:
                    self._skip_to_arrival()
                continue
            if faults.kills_engine():
                self._restart_with(iteration)
                continue
            samples = self._num_samples
            prompts = [running.client.prompt_tokens for running in entered]
            pairs = sum(prompt * (prompt + 1) for prompt in prompts) / 2
            self._iterate(samples * len(prompts), samples * sum(prompts), samples * pairs)
            for running in entered:
                if running.first_token < 0:
                    running.first_token = self.now
            iteration += 1
            failed = faults.fails_step()
            if failed is not None:
                numbers = sorted(self._batch)
                self.measures.failed += self._remove(numbers[int(failed * len(numbers))], iteration).arrival.counted
            while self._ends and self._ends[0][0] <= iteration:
                number = heapq.heappop(self._ends)[1]
                if number in self._batch:
                    self._finish(number, iteration)
            if settings.check_every and iteration % settings.check_every == 0:
                self._check()
            if on_progress and iteration % 4096 == 0:
                on_progress(self._num_ended)
        for number in sorted(self._batch):
            self._remove(number, iteration)
        self._check()
        if on_progress:
            on_progress(self._num_ended)

    def _start_engine(self) -> None:
        self._memory = BuddyAllocator(self._num_slots)
        self._batch, self._ends, self._leaving = {}, [], []
        self._blocked = False

    def _restart_with(self, iteration: int) -> None:
        """The engine dies; what it ran comes back in the order of arrival, behind nothing."""
        self._check()
        clients = []
        for _, running in sorted(self._batch.items()):
            client = running.client
            received = client.num_received + iteration - running.entered
            times = (running.start, running.first_token) if running.first_token >= 0 else None
            clients.append(client._replace(num_received=received, times=times))
        self._waiting.extendleft(reversed(clients))
        self._restart()
        self._start_engine()

    def _reserved(self, client: _Client) -> int:
        return reserved_slots(self._settings.policy, client.prompt_tokens, client.output_tokens, self._max_model_len)

    def _can_run(self, client: _Client) -> bool:
        order = self._memory.order_for(self._reserved(client))
        return self._memory.capacity(order) >= self._num_samples and super()._can_run(client)

    def _admit(self, iteration: int) -> list[_Running]:
        """Let waiting requests in, in order, until the first that does not fit."""
        entered: list[_Running] = []
        while not self._blocked and (client := self._look()) is not None:
            reserved = self._reserved(client)
            chunks = self._allocate(self._memory.order_for(reserved))
            if not chunks:
                self._blocked = True
                break
            number = client.arrival.number
            start, first_token = client.times or (self.now if self._saturate else client.arrival.time, -1.0)
            self._enter(client, reserved)
            running = _Running(client, iteration, reserved, chunks, start, first_token)
            self._batch[number] = running
            heapq.heappush(self._ends, (iteration + client.output_tokens, number))
            if client.leaves is not None:
                heapq.heappush(self._leaving, (client.leaves, number))
            entered.append(running)
        return entered

    def _allocate(self, order: int) -> list[tuple[int, int]]:
        """A chunk for each sample, or none at all."""
        chunks: list[tuple[int, int]] = []
        while len(chunks) < self._num_samples:
            chunk = self._memory.allocate(order)
            if chunk is None:
                for taken in reversed(chunks):
                    self._memory.free(taken)
                return []
            chunks.append(chunk)
        return chunks

    def _cancel(self, iteration: int) -> None:
        """Clients of running requests leave whose patience has ended."""
        while self._leaving and self._leaving[0][0] <= self.now:
            number = heapq.heappop(self._leaving)[1]
            if number in self._batch:
                self.measures.cancelled += self._remove(number, iteration).arrival.counted

    def _finish(self, number: int, iteration: int) -> None:
        running = self._batch[number]
        client = self._remove(number, iteration)
        if client.arrival.counted:
            output = client.arrival.row.output_tokens
            self.measures.request_finished(running.start, running.first_token, self.now, output)

    def _remove(self, number: int, iteration: int) -> _Client:
        """A request leaves the batch and gives its memory back."""
        running = self._batch.pop(number)
        self._leave(running.client, iteration - running.entered)
        self._allocated -= self._num_samples * running.reserved
        for chunk in running.chunks:
            self._memory.free(chunk)
        self._blocked = False
        self._num_counted -= running.client.arrival.counted
        return running.client

    def _check(self) -> None:
        """What must hold of the memory, whatever went wrong."""
        check_buddy(self._memory, [chunk for running in self._batch.values() for chunk in running.chunks])


class FasterTransformerSimulation(BaselineSimulation):
    """Request-level batching of as many requests as fit at the longest length.

    What ended in a batch keeps its slots until the batch does, as internal waste, and its place is computed. So does
    what failed or was cancelled.
    """

    def run(self, on_progress: Progress | None = None) -> None:
        """Until every counted request has ended."""
        most = self._num_slots // (self._max_model_len * self._num_samples)
        while not self._is_over:
            batch: list[_Client] = []
            start = self.now
            while len(batch) < most and (client := self._look()) is not None:
                self._enter(client, self._max_model_len)
                batch.append(client)
            if batch:
                self._run_batch(batch, start)
            elif not self._is_over:
                self._skip_to_arrival()
            if on_progress:
                on_progress(self._num_ended)

    def _can_run(self, client: _Client) -> bool:
        fits = self._num_slots >= self._max_model_len * self._num_samples
        return fits and super()._can_run(client)

    def _run_batch(self, batch: list[_Client], start: float) -> None:
        samples, faults = self._num_samples, self._faults
        size, longest = len(batch), max(client.prompt_tokens for client in batch)
        iteration, first_token = 0, -1.0
        unfinished = sorted(batch, key=lambda client: client.output_tokens, reverse=True)
        while unfinished:
            if faults.kills_engine():
                self._waiting.extendleft(reversed(batch))
                self._restart()
                return
            if iteration == 0:
                padded = samples * size * longest
                self._iterate(samples * size, padded, padded * (longest + 1) / 2)
                first_token = self.now
            else:
                self._iterate(0, 0, 0.0, samples * (size - len(unfinished)))
            iteration += 1
            place = faults.fails_step()
            failed = None if place is None else unfinished[int(place * len(unfinished))]
            for client in list(unfinished):
                left = client.leaves is not None and client.leaves <= self.now
                if client is failed or left:
                    self.measures.failed += client.arrival.counted and not left
                    self.measures.cancelled += client.arrival.counted and left
                    self._num_counted -= client.arrival.counted
                    batch.remove(client)
                elif client.output_tokens > iteration:
                    continue
                unfinished.remove(client)
                self._leave(client, iteration)
        self._allocated -= samples * size * self._max_model_len
        for client in batch:
            self._num_counted -= client.arrival.counted
            if client.leaves is not None and client.leaves <= self.now:
                self.measures.cancelled += client.arrival.counted
            elif client.arrival.counted:
                since = start if self._saturate else client.arrival.time
                self.measures.request_finished(since, first_token, self.now, client.output_tokens)
