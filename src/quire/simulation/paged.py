"""PagedSimulation: the engine's own Scheduler and BlockPool on a simulated clock, with a modelled executor."""

import heapq
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

from quire.errors import RequestError
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import DISK, HOST, Tier, TierIndex
from quire.outputs import StepDeltas
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.simulation.arrivals import Arrival
from quire.simulation.faults import Faults
from quire.simulation.invariants import check_pool
from quire.simulation.measures import Measures
from quire.simulation.modelled_executor import END_TOKEN, SAMPLED_TOKEN, ModelledExecutor
from quire.simulation.rivals import RULES, make_queues
from quire.simulation.settings import SimulationSettings
from quire.simulation.trace import HASH_BLOCK_TOKENS

QUEUE_AHEAD = 512
"""Most requests in the scheduler's queue beyond those that can run; later ones wait outside, in the same order, because
prompts need memory. First come, first served decides the same either way. Other policies see all requests."""

_UNIQUE = 2**31
"""Token ids from here on make up prompts whose content is unknown; every request has its own id."""
_SHARED = 2**32 - 1
"""The one token of shared prefixes."""
_PREFIX_ID = "shared prefix"
_NO_CLIENT = -1
"""The seed of a request that no client sent; a client's is the number of its arrival."""

Progress = Callable[[int], None]
"""Called now and then with the number of requests that have ended."""


class _Client:
    """One request as its client sees it."""

    __slots__ = ("arrival", "failed", "first_token", "last_token", "lengths", "request", "start")

    def __init__(self, arrival: Arrival, request: Request) -> None:
        self.arrival = arrival
        self.start = arrival.time
        self.request = request
        self.failed = False
        self.first_token = -1.0
        self.last_token = -1.0
        self.lengths = dict.fromkeys(range(request.params.n), 0)
        """Tokens received by each sample that has not ended."""


class PagedSimulation:
    """One run of the scheduler over a stream of requests: call `run`, then `result` for the figures."""

    def __init__(
        self,
        arrivals: Iterator[Arrival],
        executor: ModelledExecutor,
        measures: Measures,
        settings: SimulationSettings,
        *,
        num_slots: int,
        max_model_len: int,
        block_bytes: int = 0,
        windows: tuple[int, ...] = (0,),
    ) -> None:
        """`block_bytes` is the size of a block in tiers, if there are any; `windows` has that of each KV group."""
        self.now = 0.0
        self.measures = measures
        self.num_deaths = 0
        self._arrivals = arrivals
        self._next = next(arrivals, None)
        self._executor = executor
        self._settings = settings
        self._faults = Faults(settings)
        self._num_blocks = num_slots // settings.block_size
        self._max_model_len = max_model_len
        self._block_bytes = block_bytes
        self._windows = windows
        self._tier_hits = {HOST: 0, DISK: 0}
        self._on_disk: list[tuple[bytes, int]] = []
        """Blocks that the previous engine left on disk: (block hash, bytes)."""
        waits_outside = settings.scheduling_policy == "fcfs" or settings.saturate
        self._most_outstanding = settings.max_num_seqs + QUEUE_AHEAD if waits_outside else sys.maxsize
        self._clients: dict[str, _Client] = {}
        self._leaving: list[tuple[float, str]] = []
        """Heap of (when the client loses patience, request id)."""
        self._params: dict[tuple[int, bool], SamplingParams] = {}
        """(limit in tokens, whether the request ends before it) → parameters that such requests share."""
        self._prefix = [_SHARED] * settings.shared_prefix
        self._num_counted = 0
        """Waiting and running clients that are part of the result."""
        self._preemptions = self._prefix_queries = self._prefix_hits = 0
        self.scheduler = self._start_engine()

    def run(self, on_progress: Progress | None = None) -> None:
        """Run until every counted request has ended."""
        measures, faults, settings = self.measures, self._faults, self._settings
        while True:
            self._admit_arrivals()
            if not self._num_counted and (self._next is None or not self._next.counted):
                break
            if not self._clients:
                assert self._next is not None
                self.now = max(self.now, self._next.time)
                continue
            plan = self.scheduler.schedule()
            pool = self.scheduler.pool
            filled, allocated = pool.num_filled_slots, pool.num_allocated_slots
            saved = pool.num_shared_slots
            if faults.kills_engine():
                self._restart()
                continue
            result, seconds = self._executor.execute(plan, self.now)
            seconds = faults.slowed(seconds)
            failed = faults.fails_one(result)
            previous = self.now
            self.now += seconds
            measures.step(self.now, seconds, len(plan.rows), filled, 0, allocated - filled, allocated, saved)
            self._receive(self.scheduler.update(plan, result), previous)
            every = settings.check_every
            if failed or (every and measures.num_steps % every == 0):
                self._check()
            if on_progress and measures.num_steps % 256 == 0:
                on_progress(self._num_ended)
        for request_id in self._clients:
            self.scheduler.abort(request_id)
        if self._prefix:
            self.scheduler.prefixes.remove(_PREFIX_ID)
        check_pool(self.scheduler.pool, idle=True)
        self._keep_counts()
        if on_progress:
            on_progress(self._num_ended)

    def result(self) -> dict[str, Any]:
        """The figures of the run."""
        return {
            **self.measures.result(self.now),
            "preemptions": self._preemptions,
            "prefix_hit_pct": self._percent_of_queries(self._prefix_hits),
            "host_hit_pct": self._percent_of_queries(self._tier_hits[HOST]),
            "disk_hit_pct": self._percent_of_queries(self._tier_hits[DISK]),
            "engine_deaths": self.num_deaths,
        }

    def _percent_of_queries(self, num_tokens: int) -> float:
        return 100 * num_tokens / self._prefix_queries if self._prefix_queries else 0.0

    @property
    def _num_ended(self) -> int:
        measures = self.measures
        return measures.finished + measures.failed + measures.cancelled + measures.refused

    # -- requests -----------------------------------------------------------------------------------------------------

    def _admit_arrivals(self) -> None:
        """Add the requests that have arrived, and cancel those whose clients have lost patience."""
        clients = self._clients
        while (arrival := self._next) is not None and arrival.time <= self.now:
            if len(clients) >= self._most_outstanding or not (arrival.counted or self._num_counted):
                break
            self._next = next(self._arrivals, None)
            self._add(arrival)
        while self._leaving and self._leaving[0][0] <= self.now:
            _, request_id = heapq.heappop(self._leaving)
            if request_id in clients:
                self.measures.cancelled += clients[request_id].arrival.counted
                self._remove(clients[request_id])
                self.scheduler.abort(request_id)
                self._check()

    def _add(self, arrival: Arrival) -> None:
        row, settings = arrival.row, self._settings
        max_tokens = row.max_tokens or settings.max_tokens or row.output_tokens
        room = self._max_model_len - row.prompt_tokens - len(self._prefix)
        if row.output_tokens <= room:
            max_tokens = min(max_tokens, room)  # as for a client that names no limit
        if row.output_tokens > max_tokens:
            arrival = arrival._replace(row=row._replace(output_tokens=max_tokens))
            row = arrival.row
        if row.hash_ids:
            prompt = list(chain.from_iterable(repeat(block, HASH_BLOCK_TOKENS) for block in row.hash_ids))
            del prompt[row.prompt_tokens :]
        else:
            prompt = [_UNIQUE + arrival.number % _UNIQUE] * row.prompt_tokens
        prompt[:0] = self._prefix
        ends_early = row.output_tokens < max_tokens and settings.beam_width is None
        if not ends_early:
            max_tokens = row.output_tokens
        params = self._params.get((max_tokens, ends_early))
        if params is None:
            params = SamplingParams(
                n=settings.n, beam_width=settings.beam_width, max_tokens=max_tokens, ignore_eos=not ends_early
            )
            self._params[max_tokens, ends_early] = params
        request = Request(
            request_id=f"{arrival.number}",
            prompt_token_ids=prompt,
            params=params,
            seed=arrival.number,
            eos_token_ids=(END_TOKEN,) if ends_early else (),
            max_tokens=max_tokens,
            arrival_time=arrival.time,
            tenant=row.tenant,
        )
        patience = self._faults.patience()
        if ends_early:
            self._executor.output_lengths[request.seed] = row.output_tokens
        try:
            self.scheduler.add(request)
        except RequestError:
            self._executor.output_lengths.pop(request.seed, None)
            self.measures.refused += arrival.counted
            return
        self._clients[request.request_id] = _Client(arrival, request)
        self._num_counted += arrival.counted
        if patience is not None:
            since = self.now if self._settings.saturate else arrival.time
            heapq.heappush(self._leaving, (since + patience, request.request_id))

    def _receive(self, deltas: StepDeltas, previous: float) -> None:
        """Deliver a step's tokens to the clients; `previous` is when the step before it ended."""
        clients, now = self._clients, self.now
        num_steady = 0
        for delta in deltas:
            client = clients[delta.request_id]
            if delta.error is None:
                num_new = len(delta.token_ids)  # a search delivers all of a beam at its end
                client.lengths[delta.index] += num_new
                self.measures.num_tokens += num_new
                last = client.last_token
                if last == previous:
                    num_steady += 1
                elif last < 0:
                    client.first_token = now
                    if self._settings.saturate and delta.counts is not None:
                        client.start = delta.counts.first_scheduled_time
                elif last < now:  # the first time in this step that the request gets a token
                    self.measures.gaps.add(now - last)
                client.last_token = now
            else:
                client.failed = True
            if delta.finish_reason is not None:
                del client.lengths[delta.index]
                if not client.lengths:
                    self._end(client)
        if num_steady:
            self.measures.gaps.add(now - previous, num_steady)

    def _end(self, client: _Client) -> None:
        """The last sample of a request has ended."""
        self._remove(client)
        if client.failed:
            self.measures.failed += client.arrival.counted
        elif client.arrival.counted:
            self.measures.request_finished(
                client.start,
                client.first_token,
                client.last_token,
                client.arrival.row.output_tokens,
                client.request.tenant,
            )

    def _remove(self, client: _Client) -> None:
        del self._clients[client.request.request_id]
        self._executor.output_lengths.pop(client.request.seed, None)
        self._num_counted -= client.arrival.counted

    # -- engines ------------------------------------------------------------------------------------------------------

    def _start_engine(self) -> Scheduler:
        settings = self._settings
        pool = BlockPool(
            self._num_blocks,
            settings.block_size,
            windows=self._windows,
            enable_prefix_caching=settings.enable_prefix_caching,
        )
        self._tiers = self._open_tiers()
        scheduler = Scheduler(
            pool,
            SchedulerLimits(
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_model_len=self._max_model_len,
            ),
            tiers=self._tiers,
            make_queue=make_queues(self._executor.output_lengths)[settings.scheduling_policy],
            make_rule=RULES[settings.admission],
            clock=lambda: self.now,
        )
        if self._prefix:
            # As in the paper, the prefix is computed in advance, before the clock runs.
            params = SamplingParams(max_tokens=1, ignore_eos=True)
            prefix = Request(
                request_id=_PREFIX_ID, prompt_token_ids=self._prefix, params=params, seed=_NO_CLIENT, max_tokens=1
            )
            scheduler.register_prefix(prefix, [""])
            while scheduler.has_work:
                plan = scheduler.schedule()
                scheduler.update(plan, self._executor.execute(plan, self.now)[0])
            self._prefix_queries -= scheduler.stats().total_prefix_queries  # not a client's
        return scheduler

    def _check(self) -> None:
        self.scheduler.update_fill()
        check_pool(self.scheduler.pool)

    def _open_tiers(self) -> TierIndex | None:
        """The tiers of a new engine: host memory is empty, the disk holds what the previous engine left."""
        settings, size = self._settings, self._block_bytes
        if not settings.has_tiers:
            return None
        host = Tier(settings.swap_space, size) if settings.swap_space else None
        disk = Tier(settings.disk_cache_size, size, self._on_disk) if settings.disk_cache_size else None
        return TierIndex(lambda: self.now, host=host, disk=disk)

    def _restart(self) -> None:
        """The engine dies with its memory; a new one resumes every request after the tokens its client has received."""
        self._check()
        self._keep_counts()
        self.num_deaths += 1
        self.now += self._settings.restart_time
        if self._tiers is not None and DISK in self._tiers.tiers:
            self._on_disk = [(name, self._block_bytes) for name in self._tiers.tiers[DISK].hashes()]
        self._executor.clear()
        self.scheduler = self._start_engine()
        for client in self._clients.values():
            asked = client.request
            received = {index: [SAMPLED_TOKEN + index] * length for index, length in client.lengths.items()}
            self.scheduler.add(replace(asked, output_token_ids=received))

    def _keep_counts(self) -> None:
        stats = self.scheduler.stats()
        self._preemptions += stats.total_preemptions
        self._prefix_queries += stats.total_prefix_queries
        self._prefix_hits += stats.total_prefix_hits
        for tier_name, tier in stats.tiers.items():
            self._tier_hits[tier_name] += tier.total_hits
