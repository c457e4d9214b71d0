"""OrcaSimulation: iteration-level batching (Yu et al. 2022).

After each iteration finished requests leave and waiting ones enter in order of arrival, until the first that does not
get its whole reservation; the requests behind it wait too. Memory comes from a `BuddyAllocator`.
"""

import heapq
from dataclasses import dataclass, field

from quire.simulation.baselines import BaselineSimulation, Progress, WaitingClient
from quire.simulation.buddy import BuddyAllocator
from quire.simulation.invariants import check_buddy


def reserved_slots(kind: str, prompt: int, output: int, max_model_len: int) -> int:
    """Slots that a policy reserves for a request of prompt p and output o, at most the context length.

    Max reserves the context length, Pow2 p + the next power of two of o, Oracle p + o.
    """
    if kind == "orca-pow2":
        return min(max_model_len, prompt + (1 << (output - 1).bit_length()))
    if kind == "orca-oracle":
        return prompt + output
    return max_model_len


@dataclass(slots=True)
class _Running:
    """A request in Orca's batch."""

    client: WaitingClient
    entered: int
    """Iterations before it entered."""
    reserved: int
    chunks: list[tuple[int, int]]
    start: float
    first_token: float = field(default=-1.0)


class OrcaSimulation(BaselineSimulation):
    """Iteration-level batching; the policy decides the reservation."""

    _memory: BuddyAllocator
    _batch: dict[int, _Running]
    """Number of a request → the request."""
    _ends: list[tuple[int, int]]
    """Heap of (iteration at whose end a request ends, its number); requests that ended earlier stay in it."""
    _leaving: list[tuple[float, int]]
    """Heap of (when the client leaves, number of its request)."""
    _blocked: bool
    """The first waiting request did not fit, and no request has left since."""

    def run(self, on_progress: Progress | None = None) -> None:
        """Run until every counted request has ended."""
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
        """The engine dies; its running requests go to the front of the queue, in order of arrival."""
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

    def _reserved(self, client: WaitingClient) -> int:
        return reserved_slots(self._settings.policy, client.prompt_tokens, client.output_tokens, self._max_model_len)

    def _can_run(self, client: WaitingClient) -> bool:
        order = self._memory.order_for(self._reserved(client))
        return self._memory.capacity(order) >= self._num_samples and super()._can_run(client)

    def _admit(self, iteration: int) -> list[_Running]:
        """Admit waiting requests in order until the first that does not fit."""
        entered: list[_Running] = []
        while not self._blocked and (client := self._first_waiting()) is not None:
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
        """Cancel running requests whose clients have lost patience."""
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

    def _remove(self, number: int, iteration: int) -> WaitingClient:
        """Take a request out of the batch and free its memory."""
        running = self._batch.pop(number)
        self._leave(running.client, iteration - running.entered)
        self._allocated -= self._num_samples * running.reserved
        for chunk in running.chunks:
            self._memory.free(chunk)
        self._blocked = False
        self._num_counted -= running.client.arrival.counted
        return running.client

    def _check(self) -> None:
        """Raise `InvariantError` unless free and held chunks are all slots."""
        check_buddy(self._memory, [chunk for running in self._batch.values() for chunk in running.chunks])
