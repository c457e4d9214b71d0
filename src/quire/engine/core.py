"""EngineCore: the scheduler, an executor, and the step that joins them. Token ids in, token ids out.

`quire.engine.build` makes one for a model. This file is its life: `add`, `abort`, `step`, `close`.
"""

import logging
import time
from collections.abc import Sequence

from quire.engine import malloc_arena
from quire.engine.adapters import WaitingForAdapter
from quire.engine.cache_events import CacheEvents
from quire.engine.executor import Executor, PendingStep
from quire.engine.grammars import WaitingForGrammar
from quire.engine.limits import check_request
from quire.engine.pool_watch import PoolWatch
from quire.engine.step_record import StepRecord
from quire.errors import DeviceMemoryError, RequestError
from quire.grammar.cache import GrammarCache
from quire.models.weights_cache import WeightsCache
from quire.outputs import EngineStats, MemoryReport, StepDeltas
from quire.pool_view import BlockDetail, RequestDetail
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.pool_details import detail_block, detail_request
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 4.0
"""Most time that `close` spends on saving blocks to the disk tier."""


class EngineCore:
    """One model and all its requests."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        grammars: GrammarCache,
        weights_cache: WeightsCache | None,
        *,
        vocab_size: int,
        max_logprobs: int,
        overlaps: bool = False,
        events: CacheEvents | None = None,
    ) -> None:
        """`grammars` is also where the executor finds compiled grammars. `weights_cache` may still be writing.

        `overlaps`: plan and launch a step while the one before it still runs, where possible. `events` publishes what
        the KV cache holds.
        """
        self._scheduler = scheduler
        self._executor = executor
        self._grammar_cache = grammars
        self._grammars = WaitingForGrammar(grammars)
        self._adapters: WaitingForAdapter | None = None
        self._refused: list[tuple[str, RequestError]] = []
        self._vocab_size = vocab_size
        self._max_logprobs = max_logprobs
        self._weights_cache = weights_cache
        self._closed = False
        self._overlaps = overlaps
        self._events = events
        self._in_progress: tuple[StepPlan, PendingStep] | None = None
        """The step that was launched ahead."""
        self._record: StepRecord | None = None
        self.watch: PoolWatch | None = None
        """Set while somebody looks at the pool."""

    def use_adapters(self, adapters: WaitingForAdapter) -> None:
        """Serve requests with adapters, whose slots the executor reads."""
        self._adapters = adapters

    def record_steps(self, record: StepRecord) -> None:
        """Write into `record`, before each step is launched, which requests it computes."""
        self._record = record

    def add(self, request: Request, *, wait: bool = False) -> None:
        """Queue a request. Raises `RequestError` if it can never run.

        A request with a grammar is queued once the grammar is compiled. With `wait` the call returns after that;
        without, `take_refused` later reports a grammar that failed.
        """
        self._check(request)
        if request.params.structured_outputs is None:
            self._enter(request)
            return
        self._grammars.add(request)
        self._queue_compiled(block=False)
        while wait and request.request_id in self._grammars:
            self._queue_compiled(block=True)
        for place, (request_id, error) in enumerate(self._refused):
            if request_id == request.request_id:
                del self._refused[place]
                raise error

    def take_refused(self) -> list[tuple[str, RequestError]]:
        """Requests that were refused since the last call although `add` had accepted them: their grammar or their
        adapter failed."""
        refused, self._refused = self._refused, []
        return refused

    def abort(self, request_id: str) -> None:
        """Remove a request; its memory is free when this returns."""
        self._grammars.abort(request_id)
        if self._adapters is not None:
            self._adapters.abort(request_id)
        self._scheduler.abort(request_id)

    def stop(self, request_id: str, index: int) -> None:
        """End one sample of a request."""
        self._scheduler.stop(request_id, index)

    def register_prefix(self, prefix_id: str, token_ids: Sequence[int], salts: Sequence[str]) -> None:
        """Begin to compute a prefix that stays in the cache. Raises `RequestError` if it cannot be held."""
        request = Request(
            request_id=prefix_id,
            prompt_token_ids=list(token_ids),
            params=SamplingParams(temperature=0.0, max_tokens=1),
            max_tokens=1,
            priority=-(2**31),
            cache_salt=salts[0],
        )
        self._check(request)
        self._scheduler.register_prefix(request, salts)

    def holds_prefix(self, prefix_id: str) -> bool:
        """Whether a registered prefix is computed and held."""
        return prefix_id in self._scheduler.prefixes

    def unregister_prefix(self, prefix_id: str) -> None:
        """Release a registered prefix."""
        self._scheduler.prefixes.remove(prefix_id)

    def step(self) -> StepDeltas:
        """One step: schedule, execute, update.

        With `overlaps` the next step is launched before this one's result is read, if it can be planned without it. If
        every runnable sequence waits for blocks from disk, the step waits briefly for one to arrive. Preparations
        that speed up later steps run between two steps, and when there is nothing else to do.
        """
        if len(self._grammars):
            self._queue_compiled(block=not self._scheduler.has_work)
        if self._adapters is not None and len(self._adapters):
            self._queue_loaded(self._adapters)
        current = self._next_step()
        if current is None:
            return StepDeltas()
        plan, pending = current
        ahead = next_pending = None
        if self._overlaps and not pending.ready:
            ahead = self._scheduler.schedule_ahead(plan)
            if ahead is not None:
                next_pending = self._try_launch(ahead)
        self._executor.prepare(idle=False)
        deltas = self._scheduler.update(plan, pending.result())
        if ahead is not None and next_pending is not None:
            self._in_progress = ahead, next_pending
        elif ahead is not None:
            self._scheduler.roll_back(ahead)
        if self._grammars.num_held:
            self._grammars.keep_held([*self._scheduler.request_ids, *self._waiting_ids])
        if self._events is not None:
            self._events.publish()
        return deltas

    def _next_step(self) -> tuple[StepPlan, PendingStep] | None:
        """The step that was launched ahead, else a new one; None if there is nothing to run or no memory to run it."""
        if self._in_progress is not None:
            step, self._in_progress = self._in_progress, None
            return step
        plan = self._scheduler.schedule()
        if not plan.rows and plan.offload is None:
            self._executor.prepare(idle=True)
            return None
        pending = self._try_launch(plan)
        if pending is None:
            self._scheduler.roll_back(plan)
            return None
        return plan, pending

    def _try_launch(self, plan: StepPlan) -> PendingStep | None:
        """Launch a step; None if the device lacks memory for it. Raises if it lacks memory for a single token."""
        if self._record is not None:
            self._record.compute(self._scheduler.ids_in_flight(), self._scheduler.batch_in_flight)
        if self.watch is not None and plan.block_copies:
            self.watch.note_copies(plan.block_copies)
        try:
            return self._executor.launch(plan)
        except DeviceMemoryError as error:
            if plan.num_tokens <= 1:
                raise
            logger.warning("out of memory: %s; its requests wait, and the next steps are half as large", error)
            return None

    def _check(self, request: Request) -> None:
        check_request(
            request,
            vocab_size=self._vocab_size,
            max_logprobs=self._max_logprobs,
            max_model_len=self._scheduler.limits.max_model_len,
        )

    def _queue_compiled(self, *, block: bool) -> None:
        """Queue the requests whose grammar is compiled; refuse those whose grammar failed."""
        for request, error in self._grammars.take(block=block):
            try:
                if error is not None:
                    raise error
                self._enter(request)
            except RequestError as refusal:
                self._grammars.abort(request.request_id)
                self._refused.append((request.request_id, refusal))

    def _enter(self, request: Request) -> None:
        """Queue a request once its adapter is loaded. Raises `RequestError`."""
        if request.adapter:
            if self._adapters is None:
                raise RequestError(
                    "the request names an adapter, and adapters are off; start with enable_lora", param="model"
                )
            if not self._adapters.add(request):
                return
        self._scheduler.add(request)

    @property
    def _waiting_ids(self) -> Sequence[str]:
        return () if self._adapters is None else self._adapters.request_ids

    def _queue_loaded(self, adapters: WaitingForAdapter) -> None:
        """Queue the requests whose adapter is loaded; refuse those whose adapter failed."""
        block = not self._scheduler.has_work and self._in_progress is None
        for request, error in adapters.take(lambda: self._scheduler.adapters_in_use, block=block):
            try:
                if error is not None:
                    raise error
                self._scheduler.add(request)
            except RequestError as refusal:
                self._grammars.abort(request.request_id)
                self._refused.append((request.request_id, refusal))

    @property
    def has_work(self) -> bool:
        waits = len(self._grammars) > 0 or (self._adapters is not None and len(self._adapters) > 0)
        return self._scheduler.has_work or waits or len(self._refused) > 0

    @property
    def has_idle_work(self) -> bool:
        """Whether `step` would save blocks to the disk tier or capture graphs, even without requests."""
        return self._scheduler.has_idle_work or self._executor.has_idle_work

    def close(self) -> None:
        """End all requests and save to the disk tier what it lacks, for `FLUSH_SECONDS` at most. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        for request_id in self._scheduler.request_ids:
            self._scheduler.abort(request_id)
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._scheduler.has_idle_work and time.monotonic() < deadline:
            self.step()
            time.sleep(0.001)
        self._executor.close()
        if self._adapters is not None:
            self._adapters.close()
        if self._weights_cache is not None:
            self._weights_cache.close()
        if self._events is not None:
            self._events.close()
        malloc_arena.release()

    def memory_report(self) -> MemoryReport:
        report = self._scheduler.memory_report()
        report.stats = self.stats()
        return report

    def watch_pool(self, *, on: bool) -> None:
        """Begin to record changes of the pool from nothing, or stop."""
        self.watch = PoolWatch(self._scheduler) if on else None

    def detail_block(self, block: int) -> BlockDetail | None:
        """Holders and tokens of a block; None if there is no such block."""
        return detail_block(self._scheduler.pool, self._scheduler.groups.values(), block)

    def detail_request(self, request_id: str) -> RequestDetail | None:
        """Tokens and block tables of an unfinished request; None if there is none of that id."""
        self._scheduler.update_fill()
        slot = 0 if self.watch is None else self.watch.slot_of(request_id)
        return detail_request(self._scheduler.groups, request_id, slot)

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        if self._adapters is not None:
            stats.num_waiting += len(self._adapters)
        stats.num_grammars, stats.num_grammar_bytes = len(self._grammar_cache), self._grammar_cache.num_bytes
        return stats

    def reset_prefix_cache(self) -> None:
        """Make all cached prefixes unfindable, except registered ones."""
        self._scheduler.reset_prefix_cache()
        if self._events is not None:
            self._events.publish()
