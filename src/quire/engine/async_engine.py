"""AsyncLLM: the engine as a server uses it: this process tokenises, detokenises and answers; a child process computes.

    generate ─▶ InputProcessor ─▶ Add ──▶ ┊ engine process: EngineCore.step … ┊
    stream   ◀─ OutputProcessor ◀─ Outputs ◀┊                                   ┊

The child is started with one end of a socketpair and nothing else; torch is never imported here, so this process
answers while weights load. If the child dies, it is started again and every request goes on from its prompt and the
tokens it already has; a request that was there at two deaths is taken for the cause and ended.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from quire import errors
from quire.config import EngineConfig
from quire.engine.chat_template import ChatTemplate
from quire.engine.checkpoint import find_model, model_name, read_default_params
from quire.engine.grammar_checker import AsyncGrammarChecker, GrammarChecker
from quire.engine.input_processor import InputProcessor, Prompt
from quire.engine.memory_plan import MemoryPlan, plan_memory
from quire.engine.messages import (
    Abort,
    Add,
    Failed,
    FrameBuffer,
    FromEngine,
    Load,
    MemoryReported,
    Outputs,
    PhaseDone,
    Ready,
    Refused,
    RegisterPrefix,
    ReportMemory,
    ResetPrefixCache,
    Stop,
    ToEngine,
    decode_from_engine,
    encode,
)
from quire.engine.metrics import Metrics
from quire.engine.output_processor import OutputProcessor
from quire.engine.tokenizer import Tokenizer, load_tokenizer
from quire.errors import EngineDeadError, EngineUnavailableError, QueueFullError, QuireError, RequestError
from quire.model_config import ModelConfig
from quire.outputs import EngineStats, MemoryReport, RequestOutput, StepDeltas
from quire.request import Request
from quire.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MAX_DEATHS = 5
"""Engine deaths within `DEATH_WINDOW` seconds after which there is no further restart."""
DEATH_WINDOW = 300.0
DEATHS_PER_REQUEST = 2
"""A request present at this many engine deaths is not tried again."""
LOG_INTERVAL = 10.0
RATE_WINDOW = 30.0
"""Seconds over which the rate of finished requests is measured, for Retry-After."""


@dataclass(slots=True)
class _InFlight:
    """A request that has not ended: what a new engine process would need to go on, and what waits to be delivered."""

    request: Request
    live: dict[int, list[int]]
    """Samples that have not ended → their tokens so far."""
    output: RequestOutput | None = None
    """Deltas the consumer has not taken yet, merged: however slow it is, they take no more than the whole output."""
    error: QuireError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    num_prompt_logprobs: int = 0
    """Prompt positions delivered, and how many of them the present engine process has yet to repeat."""
    num_known_prompt_logprobs: int = 0
    num_deaths: int = 0


class AsyncLLM:
    """An engine in a child process. Call `start` first, on the event loop that will use it."""

    def __init__(self, config: EngineConfig, report: Callable[[str], None] = logger.info) -> None:
        self.config = config
        self.state = "loading"
        """loading, ready, draining, restarting, dead"""
        self.tokenizer: Tokenizer | None = None
        self.chat_template: ChatTemplate | None = None
        self.model_names = list(config.served_model_name) or [model_name(config.model)]
        self.default_params: dict[str, Any] = {}
        self.stats = EngineStats()
        self.metrics = Metrics(self.model_names[0])
        self._report = report
        self._folder = ""
        self._model_config: ModelConfig | None = None
        self._memory_plan: MemoryPlan | None = None
        self._inputs: InputProcessor | None = None
        self._grammar_checker: AsyncGrammarChecker | None = None
        self._outputs = OutputProcessor(None)
        self._in_flight: dict[str, _InFlight] = {}
        self._prefixes: dict[str, RegisterPrefix] = {}
        """What a new engine process registers again."""
        self._request_numbers = itertools.count()
        self._report_waiters: deque[asyncio.Future[MemoryReport]] = deque()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()
        self._failure: QuireError | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._finish_times: deque[float] = deque(maxlen=1024)
        self._last_log = (time.monotonic(), 0, 0)

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Plan the memory, start the engine process, read the tokenizer. Weights go on loading when this returns.

        Raises the errors of `quire.errors` for what can be known without loading.
        """
        folder = await asyncio.to_thread(find_model, self.config.model, self.config.revision)
        self._folder = str(folder)
        self._model_config = ModelConfig.from_folder(folder)
        self._memory_plan = plan_memory(self.config, self._model_config)
        for line in self._memory_plan.describe():
            self._report(line)
        await self._spawn()
        started = time.perf_counter()
        self.default_params = read_default_params(self.config, folder)
        self.tokenizer = await asyncio.to_thread(load_tokenizer, self.config, folder)
        with contextlib.suppress(errors.CheckpointError):
            self.chat_template = ChatTemplate.from_folder(folder)
        self._outputs = OutputProcessor(self.tokenizer)
        self._inputs = InputProcessor(
            self._model_config,
            self.tokenizer,
            max_model_len=self._memory_plan.max_model_len,
            max_logprobs=self.config.max_logprobs,
            seed=self.config.seed,
        )
        self._report(f"tokenizer: {time.perf_counter() - started:.2f} s")
        self._grammar_checker = AsyncGrammarChecker(GrammarChecker.for_model(self.config, self._model_config, folder))
        if self.tokenizer is not None:
            # Now, while the engine process reads its weights and nobody is served yet.
            self._grammar_checker.warm()

    async def wait_ready(self) -> None:
        """Return when the engine can compute. Raises what kept it from that."""
        await self._ready.wait()
        if self._failure is not None:
            raise self._failure

    async def wait_dead(self) -> QuireError:
        """Return when the engine is down for good, with the reason."""
        await self._dead.wait()
        assert self._failure is not None
        return self._failure

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """Take no new requests, let running ones finish for `drain_seconds`, then end what is left and the process."""
        self.state = "draining" if self.state != "dead" else "dead"
        deadline = time.monotonic() + drain_seconds
        while self._in_flight and self.state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._end_all(EngineUnavailableError("the server is shutting down"))
        self.state = "dead"
        if self._grammar_checker is not None:
            await self._grammar_checker.close()
        if self._reader_task is not None:
            self._reader_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader_task
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            # A closed connection ends the child after its step.
            try:
                await asyncio.wait_for(self._process.wait(), timeout=10)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    @property
    def model_config(self) -> ModelConfig:
        assert self._model_config is not None, "start() comes first"
        return self._model_config

    @property
    def memory_plan(self) -> MemoryPlan:
        assert self._memory_plan is not None, "start() comes first"
        return self._memory_plan

    @property
    def max_model_len(self) -> int:
        return self.memory_plan.max_model_len

    # -- requests -----------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        workload: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream deltas of one request, which add up by `RequestOutput.extend`; closing the iterator aborts it.

        Raises `RequestError` before the first item for what cannot be served: bad input, a full queue (429), an engine
        that takes nothing now (503). `tenant` and `workload` are those of `Request`; `request_id` is the caller's name
        for it and only echoed.
        """
        if self._inputs is None or self.state in ("draining", "dead") or (self.state == "loading"):
            raise EngineUnavailableError(f"the engine is {self.state}")
        if params.logits_processors:
            raise RequestError(
                "logits_processors are Python functions, which cannot go to another process: use LLM, or register a "
                "batch processor with the engine (--logits-processors)",
                param="logits_processors",
            )
        num_waiting = sum(1 for flight in self._in_flight.values() if flight.live) - self.stats.num_running
        if num_waiting >= self.config.max_queue_size > 0:
            raise QueueFullError(
                f"{num_waiting} requests are waiting, the limit is {self.config.max_queue_size} (max_queue_size)",
                retry_after=self._retry_after(num_waiting),
            )
        internal_id = f"r{next(self._request_numbers)}"
        make = partial(
            self._inputs.make_request,
            internal_id,
            prompt,
            params,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            workload=workload,
        )
        # A long text takes milliseconds to tokenise, in which other streams must go on.
        request, text = await asyncio.to_thread(make) if isinstance(prompt, str) else make()
        if params.structured_outputs is not None and self._grammar_checker is not None:
            request = replace(request, grammar_bytes=await self._grammar_checker.check(params.structured_outputs))
        flight = _InFlight(request, {index: [] for index in range(request.params.n)})
        self._in_flight[internal_id] = flight
        self._outputs.add(request, text)
        try:
            self._send(Add(request))
            finished = False
            while not finished:
                await flight.news.wait()
                flight.news.clear()
                if flight.error is not None:
                    raise flight.error
                output, flight.output = flight.output, None
                if output is not None:
                    finished = output.finished
                    output.request_id = request_id or internal_id
                    yield output
        finally:
            if self._in_flight.pop(internal_id, None) is not None and flight.live:
                self._outputs.discard(internal_id)
                self._send(Abort([internal_id]))

    def register_prefix(self, prefix: Prompt, salts: Sequence[str] = ("",)) -> str:
        """Have a prefix computed, before whatever waits, and kept: it is found under each of the salts.

        Returns its id. An engine process that replaces a dead one computes it again. Raises `RequestError` with the
        numbers if it is longer than the context, or all prefixes together could exceed `max_pinned_share`.
        """
        assert self._inputs is not None, "start() comes first"
        token_ids, plan = self._inputs.token_ids_of(prefix), self.memory_plan
        if not self.config.enable_prefix_caching:
            raise RequestError("prefixes need the prefix cache; set enable_prefix_caching", param="prefix")
        if not plan.block_size <= len(token_ids) < plan.max_model_len:
            raise RequestError(
                f"the prefix has {len(token_ids)} tokens; it needs a full block of {plan.block_size} and less than "
                f"the context of {plan.max_model_len}",
                param="prefix",
            )
        held = sum(len(other.token_ids) // plan.block_size for other in self._prefixes.values())
        needed, limit = len(token_ids) // plan.block_size, int(plan.num_blocks * self.config.max_pinned_share)
        if held + needed > limit:
            raise RequestError(
                f"the prefix takes {needed} KV blocks of {plan.block_size} tokens; others hold {held}, and together "
                f"they may hold {limit} of the pool's {plan.num_blocks} (max_pinned_share)",
                param="prefix",
            )
        message = RegisterPrefix(f"prefix-{len(self._prefixes)}", token_ids, tuple(salts))
        self._prefixes[message.prefix_id] = message
        self._send(message)
        return message.prefix_id

    def reset_prefix_cache(self) -> None:
        """Make every stored prefix unfindable that is not registered."""
        self._send(ResetPrefixCache())

    async def memory_report(self) -> MemoryReport:
        """What the KV pool holds now. Raises `EngineUnavailableError` where there is no engine to ask."""
        if self.state not in ("ready", "draining"):
            raise EngineUnavailableError(f"the engine is {self.state}")
        answer: asyncio.Future[MemoryReport] = asyncio.get_running_loop().create_future()
        self._report_waiters.append(answer)
        self._send(ReportMemory())
        return await answer

    def _retry_after(self, num_waiting: int) -> int:
        """Seconds until the queue has room: as the scheduler predicts, or else from the rate of requests finished."""
        excess, predicted = num_waiting - self.config.max_queue_size + 1, self.stats.predicted_queue_seconds
        if predicted is not None and self.stats.num_waiting:
            seconds = excess * predicted / self.stats.num_waiting
        else:
            now = time.monotonic()
            recent = sum(1 for moment in self._finish_times if moment > now - RATE_WINDOW)
            seconds = excess * RATE_WINDOW / max(1, recent)
        return min(60, max(1, math.ceil(seconds)))

    # -- the engine process -------------------------------------------------------------------------------------------

    async def _spawn(self) -> None:
        mine, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "quire.engine.engine_process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=mine)
        self._send(Load(self.config, self.memory_plan, self._folder))
        for prefix in self._prefixes.values():
            self._send(prefix)
        self._reader_task = asyncio.create_task(self._read(reader))

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Take in what the engine says until it falls silent for good."""
        buffer = FrameBuffer()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                for body in buffer.feed(data):
                    self._handle(decode_from_engine(body))
        if self.state != "dead":
            await self._handle_death()

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Outputs(deltas, stats):
                self._take_stats(stats)
                self._deliver(deltas)
            case MemoryReported(report):
                waiter = self._report_waiters.popleft()
                if not waiter.done():
                    waiter.set_result(report)
            case Refused(request_id, text, param, code):
                if request_id in self._prefixes:
                    logger.error("the prefix %s is not kept: %s", request_id, text)
                self._end(request_id, RequestError(text, param=param, code=code))
            case PhaseDone(name, seconds):
                self._report(f"{name}: {seconds:.2f} s")
            case Ready():
                self.state = "ready" if self.state in ("loading", "restarting") else self.state
                self._ready.set()
            case Failed(kind, text):
                error_type = getattr(errors, kind, QuireError)
                self._fail(error_type(text))

    def _deliver(self, deltas: StepDeltas) -> None:
        for (request_id, index), token_id in zip(deltas.samples, deltas.token_ids, strict=True):
            flight = self._in_flight.get(request_id)
            if flight is not None and index in flight.live:
                flight.live[index].append(token_id)
        for delta in deltas.others:
            flight = self._in_flight.get(delta.request_id)
            if flight is None:
                continue
            if delta.prompt_logprobs is not None:
                # A new engine process computes the prompt again; what was delivered before is not delivered twice.
                known = min(flight.num_known_prompt_logprobs, len(delta.prompt_logprobs))
                flight.num_known_prompt_logprobs -= known
                delta.prompt_logprobs = delta.prompt_logprobs[known:] or None
                flight.num_prompt_logprobs += len(delta.prompt_logprobs or ())
            if delta.finish_reason is not None:
                flight.live.pop(delta.index, None)
            elif delta.index in flight.live:
                flight.live[delta.index] += delta.token_ids
        outputs, stopped = self._outputs.process(deltas)
        for request_id, index in stopped:
            self._in_flight[request_id].live.pop(index, None)
        if stopped:
            self._send(Stop(stopped))
        for output in outputs:
            flight = self._in_flight[output.request_id]
            if flight.output is None:
                flight.output = output
            else:
                flight.output.extend(output)
            flight.news.set()
            if output.finished:
                self._finish_times.append(time.monotonic())

    def _take_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        self.metrics.record_stats(stats)
        then, prompt_tokens, generated = self._last_log
        now = time.monotonic()
        if now - then >= LOG_INTERVAL:
            busy = (stats.total_prompt_tokens, stats.total_generated_tokens) != (prompt_tokens, generated)
            if busy and not self.config.disable_log_stats:
                self._report(
                    f"{(stats.total_prompt_tokens - prompt_tokens) / (now - then):.0f} prompt and "
                    f"{(stats.total_generated_tokens - generated) / (now - then):.0f} output tokens/s, "
                    f"{stats.num_running} running, {stats.num_waiting} waiting, "
                    f"KV cache {stats.kv_cache_usage:.1%} used, {stats.waste:.1%} of it wasted, "
                    f"{stats.total_preemptions} preemptions"
                )
            self._last_log = (now, stats.total_prompt_tokens, stats.total_generated_tokens)

    async def _handle_death(self) -> None:
        """The engine process has ended: start another one and hand it what the old one had, or give up."""
        assert self._process is not None
        assert self._writer is not None
        self._writer.close()
        for waiter in self._report_waiters:
            if not waiter.done():
                waiter.set_exception(EngineUnavailableError("the engine ended before it could answer"))
        self._report_waiters.clear()
        code = await self._process.wait()
        if self._failure is not None:
            return
        if self.state == "loading":
            self._fail(
                EngineDeadError(f"the engine process ended while loading (exit code {code}); its output says why")
            )
            return
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATH_WINDOW:
            self._fail(
                EngineDeadError(
                    f"the engine process died {MAX_DEATHS} times in {DEATH_WINDOW:.0f} s (exit code {code})"
                )
            )
            return
        logger.error("the engine process ended (exit code %s); starting another one", code)
        self.state = "restarting" if self.state == "ready" else self.state
        self.stats = replace(self.stats, num_running=0, num_waiting=0, num_used_blocks=0, num_pinned_blocks=0)
        self._last_log = (now, 0, 0)  # the next one counts from 0
        for request_id, flight in list(self._in_flight.items()):
            flight.num_deaths += 1
            if flight.num_deaths >= DEATHS_PER_REQUEST:
                self._end(
                    request_id, EngineDeadError(f"the engine process died {flight.num_deaths} times on this request")
                )
        await self._spawn()
        for flight in self._in_flight.values():
            if flight.live:
                flight.num_known_prompt_logprobs = flight.num_prompt_logprobs
                self._send(Add(replace(flight.request, output_token_ids=flight.live)))

    def _end(self, request_id: str, error: QuireError) -> None:
        flight = self._in_flight.get(request_id)
        if flight is not None:
            flight.live.clear()
            flight.error = error
            flight.news.set()
            self._outputs.discard(request_id)

    def _end_all(self, error: QuireError) -> None:
        for request_id in list(self._in_flight):
            self._end(request_id, error)

    def _fail(self, error: QuireError) -> None:
        """There will be no engine."""
        self.state = "dead"
        self._failure = error
        self._ready.set()
        self._dead.set()
        self._end_all(error)
