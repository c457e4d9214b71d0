"""The systems the paper compares with: contiguous memory reserved per request when it starts, no preemption.

Orca (Yu et al. 2022) batches per iteration: after each one, finished requests leave and waiting ones enter in order
of arrival, as long as the first of them gets its whole reservation; those behind it wait with it. FasterTransformer
batches per request: a batch runs until its longest output ends, and all its answers leave together.

A reservation is for prompt p and output o, and never more than the context length:
Max the context length, Pow2 p + the next power of two of o, Oracle p + o. Memory comes from a `BuddyAllocator`.

All requests of a batch advance by one token per iteration, so sums over the batch are kept instead of states of
requests, and an iteration costs the same whatever the batch.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from quire.simulation.arrivals import Arrival
from quire.simulation.buddy import BuddyAllocator
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


class BaselineSimulation(ABC):
    """What both ways of batching share: the arrivals, the sums over the batch, the measures."""

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
        self._arrivals = arrivals
        self._next = next(arrivals, None)
        self._step_time = step_time
        self._num_slots = num_slots
        self._max_model_len = max_model_len
        self._num_samples = settings.n
        self._saturate = settings.saturate
        self._num_counted = 0
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
        return self.measures.finished + self.measures.refused

    @abstractmethod
    def run(self, on_progress: Progress | None = None) -> None:
        """Until every counted request has ended."""

    def result(self) -> dict[str, Any]:
        """The figures of the run."""
        figures = self.measures.result(self.now)
        return {**figures, "preemptions": 0, "prefix_hit_pct": 0.0, "engine_deaths": 0}

    def _skip_to_arrival(self) -> None:
        assert self._next is not None
        self.now = max(self.now, self._next.time)

    def _take(self) -> Arrival | None:
        """The first waiting request; those that can never run are refused on the way."""
        while (arrival := self._next) is not None and arrival.time <= self.now:
            if not (arrival.counted or self._num_counted):
                break
            if self._can_run(arrival):
                return arrival
            self.measures.refused += arrival.counted
            self._next = next(self._arrivals, None)
        return None

    def _can_run(self, arrival: Arrival) -> bool:
        return arrival.row.prompt_tokens + arrival.row.output_tokens <= self._max_model_len

    def _enter(self, arrival: Arrival, reserved: int) -> None:
        row, samples = arrival.row, self._num_samples
        self._next = next(self._arrivals, None)
        self._num_counted += arrival.counted
        self._running += samples
        self._tokens += samples * row.prompt_tokens
        self._final += samples * (row.prompt_tokens + row.output_tokens)
        self._allocated += samples * reserved

    def _leave(self, arrival: Arrival) -> None:
        row, samples = arrival.row, self._num_samples
        final = samples * (row.prompt_tokens + row.output_tokens)
        self._running -= samples
        self._tokens -= final
        self._final -= final

    def _iterate(self, num_new: int, prompt_tokens: int, prompt_pairs: float, num_idle: int = 0) -> None:
        """One iteration: `num_new` sequences compute their prompts, the others of the batch one token each.

        `num_idle` sequences that have ended are computed for nothing.
        """
        running = self._running
        decoding = running - num_new + num_idle
        read = self._tokens
        seconds = self._step_time.seconds(
            running + num_idle,
            decoding + prompt_tokens,
            read,
            read - prompt_tokens + prompt_pairs,
            running + num_idle,
        )
        self.now += seconds
        tokens, final = self._tokens, self._final
        self._tokens = tokens + running
        measures = self.measures
        measures.num_tokens += running
        measures.step(self.now, seconds, running, tokens, final - tokens, self._allocated - final, self._allocated, 0)
        if running > num_new:
            measures.gaps.add(seconds, running - num_new)


class _Running(NamedTuple):
    """A request in Orca's batch."""

    ends: int
    number: int
    arrival: Arrival
    reserved: int
    chunks: list[tuple[int, int]]
    times: list[float]
    """From when its latency counts, and when it got its first token."""


class OrcaSimulation(BaselineSimulation):
    """Iteration-level batching; the policy says what is reserved."""

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
        self._kind = settings.policy
        self._memory = BuddyAllocator(num_slots)
        self._blocked = False
        """Whether the first waiting request did not fit, and nothing has left since."""
        self._batch: list[_Running] = []
        """A heap by the iteration at whose end a request ends."""
        super().__init__(arrivals, step_time, measures, settings, num_slots=num_slots, max_model_len=max_model_len)

    def run(self, on_progress: Progress | None = None) -> None:
        """Until every counted request has ended."""
        batch, iteration = self._batch, 0
        while not self._is_over:
            entered = self._admit(iteration)
            if not batch:
                if not self._is_over:
                    self._skip_to_arrival()
                continue
            samples = self._num_samples
            prompts = [arrival.row.prompt_tokens for arrival, _ in entered]
            pairs = sum(prompt * (prompt + 1) for prompt in prompts) / 2
            self._iterate(samples * len(prompts), samples * sum(prompts), samples * pairs)
            for _, times in entered:
                times[1] = self.now
            iteration += 1
            while batch and batch[0][0] <= iteration:
                self._finish(heapq.heappop(batch))
            if on_progress and iteration % 4096 == 0:
                on_progress(self._num_ended)
        if on_progress:
            on_progress(self._num_ended)

    def _can_run(self, arrival: Arrival) -> bool:
        row = arrival.row
        reserved = reserved_slots(self._kind, row.prompt_tokens, row.output_tokens, self._max_model_len)
        fits = self._memory.capacity(self._memory.order_for(reserved)) >= self._num_samples
        return fits and super()._can_run(arrival)

    def _admit(self, iteration: int) -> list[tuple[Arrival, list[float]]]:
        """Let waiting requests in, in order, until the first that does not fit."""
        entered: list[tuple[Arrival, list[float]]] = []
        while not self._blocked and (arrival := self._take()) is not None:
            row = arrival.row
            reserved = reserved_slots(self._kind, row.prompt_tokens, row.output_tokens, self._max_model_len)
            chunks = self._allocate(self._memory.order_for(reserved))
            if not chunks:
                self._blocked = True
                break
            times = [self.now if self._saturate else arrival.time, 0.0]
            self._enter(arrival, reserved)
            ends = iteration + row.output_tokens
            heapq.heappush(self._batch, _Running(ends, arrival.number, arrival, reserved, chunks, times))
            entered.append((arrival, times))
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

    def _finish(self, ended: _Running) -> None:
        arrival, (start, first_token) = ended.arrival, ended.times
        self._leave(arrival)
        self._allocated -= self._num_samples * ended.reserved
        for chunk in ended.chunks:
            self._memory.free(chunk)
        self._blocked = False
        self._num_counted -= arrival.counted
        if arrival.counted:
            self.measures.request_finished(start, first_token, self.now, arrival.row.output_tokens)


class FasterTransformerSimulation(BaselineSimulation):
    """Request-level batching of as many requests as fit at the longest length.

    What ended in a batch keeps its slots until the batch does, as internal waste, and its place is computed.
    """

    def run(self, on_progress: Progress | None = None) -> None:
        """Until every counted request has ended."""
        most = self._num_slots // (self._max_model_len * self._num_samples)
        while not self._is_over:
            batch: list[Arrival] = []
            start = self.now
            while len(batch) < most and (arrival := self._take()) is not None:
                self._enter(arrival, self._max_model_len)
                batch.append(arrival)
            if batch:
                self._run_batch(batch, start)
            elif not self._is_over:
                self._skip_to_arrival()
            if on_progress:
                on_progress(self._num_ended)

    def _can_run(self, arrival: Arrival) -> bool:
        fits = self._num_slots >= self._max_model_len * self._num_samples
        return fits and super()._can_run(arrival)

    def _run_batch(self, batch: list[Arrival], start: float) -> None:
        samples = self._num_samples
        longest = max(arrival.row.prompt_tokens for arrival in batch)
        padded = samples * len(batch) * longest
        self._iterate(samples * len(batch), padded, padded * (longest + 1) / 2)
        first_token = self.now
        num_ended, iteration = 0, 1
        by_length = sorted(batch, key=lambda arrival: arrival.row.output_tokens, reverse=True)
        while True:
            while by_length and by_length[-1].row.output_tokens <= iteration:
                self._leave(by_length.pop())
                num_ended += samples
            if not by_length:
                break
            self._iterate(0, 0, 0.0, num_ended)
            iteration += 1
        self._allocated -= samples * len(batch) * self._max_model_len
        for arrival in batch:
            self._num_counted -= arrival.counted
            if arrival.counted:
                since = start if self._saturate else arrival.time
                self.measures.request_finished(since, first_token, self.now, arrival.row.output_tokens)
