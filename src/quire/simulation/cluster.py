"""ClusterSimulation: many replicas behind the router's own `Fleet` and policies, on one clock.

A heap holds all that will happen: turns that arrive, steps that end, deaths and returns of replicas, and what the
router will learn of blocks. That is `event_delay` seconds late, so the router decides on old knowledge.
"""

import heapq
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quire.errors import RequestError
from quire.kv_cache.block_hash import BlockHash
from quire.outputs import StepDeltas
from quire.request import Request
from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES, Prompt
from quire.routing.replica import Work
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.simulation.cluster_node import Node, PlainRun
from quire.simulation.cluster_settings import ClusterSettings
from quire.simulation.cluster_workload import Session, Turn
from quire.simulation.modelled_executor import SAMPLED_TOKEN, ModelledExecutor
from quire.simulation.oracles import EqualCapacity, ForgetsNothing
from quire.simulation.prompt_hashes import PromptHashes
from quire.simulation.settings import SimulationSettings

KEY_MASK = 2**64 - 1
MAX_ROUTER_BLOCKS = 2**17

Event = Callable[[], None]


@dataclass(slots=True)
class _Client:
    """One turn in flight."""

    turn: Turn
    rest: tuple[Turn, ...]
    """The turns that follow."""
    request: Request
    block_hashes: list[BlockHash]
    prompt: Prompt
    arrival: float
    work: Work
    node: int
    num_tokens: int = 0
    """Tokens of the answer so far."""
    first_token: float = -1.0


class ClusterSimulation:
    """One run: call `run`, then `result`."""

    def __init__(
        self,
        sessions: Iterator[Session],
        make_executor: Callable[[], ModelledExecutor],
        settings: SimulationSettings,
        cluster: ClusterSettings,
        *,
        num_blocks: int,
        max_model_len: int,
    ) -> None:
        self.now = 0.0
        self._settings, self._cluster = settings, cluster
        self._sessions = sessions
        limits = SchedulerLimits(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        self._max_model_len = max_model_len
        self._fleet = Fleet(
            POLICIES[cluster.routing](), max_blocks=MAX_ROUTER_BLOCKS, max_requests=cluster.max_replica_requests
        )
        self._nodes = [
            Node(
                make_executor,
                limits,
                num_blocks=num_blocks,
                block_size=settings.block_size,
                clock=lambda: self.now,
                on_blocks=partial(self._note_blocks, number),
            )
            for number in range(cluster.cluster)
        ]
        for number in range(cluster.cluster):
            self._fleet.join(_name(number))
        self._events: list[tuple[float, int, Event]] = []
        self._num_events = 0
        self._news: deque[tuple[float, int, int, bool]] = deque()
        """(when the router learns it, replica, block, whether it is stored)"""
        self._hashes = PromptHashes(settings.block_size)
        self._clients: dict[str, _Client] = {}
        self._orphans: deque[_Client] = deque()
        """Requests that wait for a replica, because there was none."""
        self._updating: list[int] = []
        self._oracle, self._equal_oracle = ForgetsNothing(), EqualCapacity(num_blocks * cluster.cluster)
        self._asked = self._oracle_hits = self._equal_hits = 0
        self._num_good = self._refused = self._moved = 0
        self._ttft, self._latency = array("d"), array("d")
        self._num_output = self._num_begun = 0

    def run(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Run until every session has ended. `on_progress` is called with the requests that have ended so far."""
        for when, node in self._cluster.death_times:
            self._at(when, partial(self._kill, node))
        if self._cluster.rolling_update is not None:
            self._updating = list(range(len(self._nodes)))
            self._at(self._cluster.rolling_update, self._update_next)
        self._next_session()
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            while self._news and self._news[0][0] <= self.now:
                self._learn(*self._news.popleft())
            event()
            if on_progress is not None and self._num_events % 256 == 0:
                on_progress(len(self._ttft) + self._refused)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _next_session(self) -> None:
        session = next(self._sessions, None)
        if session is not None:
            self._at(session.start, partial(self._begin_session, session))

    def _begin_session(self, session: Session) -> None:
        self._next_session()
        self._arrive(session.turns)

    def _arrive(self, turns: tuple[Turn, ...]) -> None:
        turn, rest = turns[0], turns[1:]
        num_tokens = turn.prompt_tokens
        output = min(turn.output_tokens, self._max_model_len - num_tokens)
        self._num_begun += 1
        if output < 1:
            self._refused += 1  # the session has outgrown the context
            return
        tokens, hashes = self._hashes.of(turn, is_last=not rest)
        blocks = [_key(block_hash) for block_hash in hashes]
        prompt = Prompt(blocks, num_tokens, self._settings.block_size, f"s{turn.session}")
        self._count_oracles(prompt, output)
        request = Request(
            request_id=f"{turn.session}.{turn.number}",
            prompt_token_ids=tokens,
            params=SamplingParams(max_tokens=output, ignore_eos=True),
            seed=self._num_begun,
            max_tokens=output,
            arrival_time=self.now,
        )
        work = self._choose(prompt)
        if work is None:
            self._refused += 1
            return
        self._send(_Client(turn, rest, request, hashes, prompt, self.now, work, _number(work)))

    def _send(self, client: _Client) -> None:
        request = client.request
        if client.num_tokens:
            request = replace(request, output_token_ids={0: [SAMPLED_TOKEN] * client.num_tokens})
        node = self._nodes[client.node]
        try:
            is_cut = node.add(request, client.block_hashes, self.now)
        except RequestError:
            self._refused += 1
            self._fleet.end(client.work)
            return
        self._clients[request.request_id] = client
        if is_cut or node.begin(self.now):
            self._await_end(client.node)

    def _choose(self, prompt: Prompt) -> Work | None:
        for node in self._nodes:
            if node.plain_run is not None:
                self._take_tokens(node.plain_run)
        return self._fleet.choose(prompt)

    def _count_oracles(self, prompt: Prompt, num_output_tokens: int) -> None:
        self._asked += prompt.num_tokens
        size = prompt.block_size
        num_output_blocks = num_output_tokens // size
        self._oracle_hits += size * self._oracle.find(prompt.blocks, num_output_blocks)
        self._equal_hits += size * self._equal_oracle.find(prompt.blocks, num_output_blocks)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _await_end(self, number: int) -> None:
        node = self._nodes[number]
        self._at(node.ends_at, partial(self._end_steps, number, node.turn))

    def _end_steps(self, number: int, turn: int) -> None:
        node = self._nodes[number]
        if node.turn != turn:
            return
        if node.plain_run is not None:
            self._take_tokens(node.plain_run)
            node.end_plain_run()
        else:
            self._receive(node.end_step())
        if node.begin(self.now):
            self._await_end(number)
        elif (
            self._updating[:1] == [number] and not node.scheduler.has_work and _name(number) not in self._fleet.replicas
        ):
            self._restart(number)

    def _take_tokens(self, run: PlainRun) -> None:
        """Give clients the tokens that they have got from a run by now."""
        num_new = run.take_tokens(self.now)
        if num_new:
            self._num_output += num_new * len(run.request_ids)
            for request_id in run.request_ids:
                client = self._clients[request_id]
                client.num_tokens += num_new
                self._fleet.add_tokens(client.work, num_new)

    def _receive(self, deltas: StepDeltas) -> None:
        for delta in deltas:
            client, num_new = self._clients[delta.request_id], len(delta.token_ids)
            client.num_tokens += num_new
            self._num_output += num_new
            self._fleet.add_tokens(client.work, num_new)
            if client.first_token < 0 and num_new:
                client.first_token = self.now
            if delta.finish_reason is not None:
                self._finish(client)

    def _finish(self, client: _Client) -> None:
        del self._clients[client.request.request_id]
        self._fleet.end(client.work)
        ttft = client.first_token - client.arrival
        per_token = (self.now - client.first_token) / max(1, client.num_tokens - 1)
        self._ttft.append(ttft)
        self._latency.append(self.now - client.arrival)
        self._num_good += ttft <= self._settings.ttft_limit and per_token <= self._settings.tbt_limit
        if client.rest:
            self._at(self.now + client.turn.pause, partial(self._arrive, client.rest))

    # -- replicas -----------------------------------------------------------------------------------------------------

    def _kill(self, number: int) -> None:
        """A replica dies; its requests go on elsewhere from prompt and tokens."""
        if not self._nodes[number].is_up:
            return
        self._leave(number)
        run = self._nodes[number].plain_run
        if run is not None:
            self._take_tokens(run)
        self._nodes[number].die(self.now)
        for client in [each for each in self._clients.values() if each.node == number]:
            del self._clients[client.request.request_id]
            self._fleet.end(client.work)
            self._moved += 1
            self._move(client)
        self._at(self.now + self._settings.restart_time, partial(self._return, number))

    def _move(self, client: _Client) -> None:
        work = self._choose(client.prompt)
        if work is None:
            self._orphans.append(client)
            return
        client.work, client.node = work, _number(work)
        self._send(client)

    def _update_next(self) -> None:
        """Let the next replica finish its requests, and then replace it."""
        if self._updating:
            number = self._updating[0]
            self._leave(number)
            if not self._nodes[number].scheduler.has_work:
                self._restart(number)

    def _restart(self, number: int) -> None:
        self._nodes[number].die(self.now)
        self._at(self.now + self._settings.restart_time, partial(self._return, number))

    def _return(self, number: int) -> None:
        self._nodes[number].is_up = True
        self._fleet.join(_name(number))
        while self._orphans and self._fleet.replicas:
            self._move(self._orphans.popleft())
        if self._updating[:1] == [number]:
            del self._updating[0]
            self._update_next()

    def _leave(self, number: int) -> None:
        if _name(number) in self._fleet.replicas:
            self._fleet.leave(_name(number))

    # -- knowledge ----------------------------------------------------------------------------------------------------

    def _note_blocks(self, number: int, block_hash: BlockHash, stored: bool) -> None:
        self._news.append((self.now + self._cluster.event_delay, number, _key(block_hash), stored))

    def _learn(self, _: float, number: int, block: int, stored: bool) -> None:
        (self._fleet.stored if stored else self._fleet.removed)(_name(number), (block,))

    def _at(self, when: float, event: Event) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, event))

    def result(self) -> dict[str, Any]:
        """The figures of the run."""
        hits = [node.prefix_hits for node in self._nodes]
        found, asked = sum(hit for hit, _ in hits), sum(query for _, query in hits)
        hit = 100 * found / max(1, asked)
        oracle, equal = (100 * each / max(1, self._asked) for each in (self._oracle_hits, self._equal_hits))
        finished, seconds = len(self._ttft), max(self.now, 1e-9)
        return {
            "finished": finished,
            "refused": self._refused,
            "moved": self._moved,
            "lost": self._num_begun - finished - self._refused,
            "seconds": self.now,
            "requests_per_s": finished / seconds,
            "goodput_per_s": self._num_good / seconds,
            "output_tokens_per_s": self._num_output / seconds,
            "ttft_p50": quantile(self._ttft, 50),
            "ttft_p99": quantile(self._ttft, 99),
            "latency_p50": quantile(self._latency, 50),
            "prefix_hit_pct": hit,
            "oracle_hit_pct": oracle,
            "equal_oracle_hit_pct": equal,
            "of_oracle_pct": 100 * hit / oracle if oracle else 100.0,
            "of_equal_oracle_pct": 100 * hit / equal if equal else 100.0,
            "most_work_to_mean": _most_to_mean([node.num_computed for node in self._nodes]),
            "most_busy_to_mean": _most_to_mean([node.busy_seconds for node in self._nodes]),
            "steps": sum(node.num_steps for node in self._nodes),
            "generated_tokens": self._num_output,
        }


def quantile(values: Sequence[float], percent: float) -> float | None:
    """The value that `percent` of all do not exceed; None if there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else None


def _most_to_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def _key(block_hash: BlockHash) -> int:
    return int.from_bytes(block_hash[-8:], "big")


def _name(number: int) -> str:
    return f"replica-{number}"


def _number(work: Work) -> int:
    return int(work.replica.name.removeprefix("replica-"))
