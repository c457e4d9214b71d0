"""AsyncLLM: the engine for a server. This process tokenises, detokenises and answers; a child process computes.

    generate ─▶ InputProcessor ─▶ Add ──▶ ┊ engine process: EngineCore.step … ┊
    stream   ◀─ OutputProcessor ◀─ Outputs ◀┊                                   ┊

`EngineClient` owns the child process, `RequestStreams` the requests in flight, `PrefixRegistrations` the registered
prefixes, `Throughput` the latest stats. If the child dies, it is replaced, and every request continues from its prompt
and the tokens it already has.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from quire.config import EngineConfig
from quire.embeddings import EmbeddingRequestOutput, embedding_params, make_embedding
from quire.engine.chat_template_process import ChatTemplateProcess
from quire.engine.checkpoint import find_model, model_name, read_default_params
from quire.engine.engine_child import Death
from quire.engine.engine_client import EngineClient, Owner
from quire.engine.grammar_checker import AsyncGrammarChecker, GrammarChecker
from quire.engine.image_prompt import ImageSupport
from quire.engine.input_processor import InputProcessor, Prompt, RequestOptions
from quire.engine.limits import NOTHING_YET, check_one_engine, resumed
from quire.engine.memory_plan import MemoryPlan, plan_memory
from quire.engine.memory_questions import MemoryQuestions
from quire.engine.memory_sizes import available_memory
from quire.engine.messages import (
    FromEngine,
    Load,
    MemoryDescribed,
    MemoryReported,
    Outputs,
    PhaseDone,
    PoolChanged,
    PrefixAccepted,
    Refused,
    ResetPrefixCache,
)
from quire.engine.metrics import Metrics
from quire.engine.model_task import read_model
from quire.engine.pool_views import PoolViews
from quire.engine.prefix_registrations import PrefixRegistrations
from quire.engine.queue_gate import QueueGate
from quire.engine.request_streams import RequestStreams, Stream, Tap
from quire.engine.text_prompts import TextPrompts, read_text_prompts
from quire.engine.throughput import Throughput
from quire.engine.tokenizer import Tokenizer, describe_tokenizer, load_tokenizer
from quire.errors import CheckpointError, EngineUnavailableError, QueueFullError, QuireError, RequestError
from quire.lora.registry import Adapter, AdapterRegistry
from quire.model_config import ModelConfig
from quire.outputs import EngineStats, RequestOutput
from quire.request import BegunPrompt, Task
from quire.sampling_params import SamplingParams
from quire.scheduler.request_check import check_lengths

logger = logging.getLogger(__name__)


class AsyncLLM:
    """An engine in a child process. Call `start` first, on the event loop that will use it."""

    def __init__(self, config: EngineConfig, report: Callable[[str], None] = logger.info, *, index: int = 0) -> None:
        """`report` gets the memory plan, the phases of start-up and a line of throughput every ten seconds. `index`:
        the place among equal engines, which have other cards each."""
        check_one_engine(config)
        self.config = config
        self._index = index
        self.tokenizer: Tokenizer | None = None
        self.chat_template: ChatTemplateProcess | None = None
        self.model_names = list(config.served_model_name) or [model_name(config.model)]
        self.adapters = AdapterRegistry(config.lora_modules, enabled=config.enable_lora)
        """Adapters by the names that requests choose them by."""
        self.other_names: list[str] = []
        """Names of a model that serves beside this one."""
        self.default_params: dict[str, Any] = {}
        self.text_prompts = TextPrompts()
        self.metrics = Metrics(self.model_names[0], index)
        self._report = report
        self._model_config: ModelConfig | None = None
        self._memory_plan: MemoryPlan | None = None
        self._inputs: InputProcessor | None = None
        self._grammar_checker: AsyncGrammarChecker | None = None
        self.images: ImageSupport | None = None
        self._client = EngineClient(
            Owner(
                on_message=self._handle,
                on_death=self._handle_death,
                on_spawn=self._resume,
                on_ready=lambda: self._streams.start_timer(),
                on_failure=self._end_waits,
                has_work=lambda: self._streams.any_live,
            )
        )
        self._streams = RequestStreams(None, self._client.send)
        self._prefixes = PrefixRegistrations(self._client.send)
        self._throughput = Throughput(None if config.disable_log_stats else report)
        self._gate = QueueGate(self._throughput, config.max_queue_size)
        self._request_numbers = itertools.count()
        self.questions = MemoryQuestions(self._client.send, lambda: self.state)
        self.memory_report = self.questions.report
        self.views = PoolViews(self._client.send, self)

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self, *, reserved: int = 0, memory: int | None = None, warm: bool = True) -> None:
        """Plan the memory, start the engine process, read the tokenizer. Weights go on loading when this returns.
        `reserved` bytes of the host's memory belong to another engine; or `memory` bytes are this one's. `warm` also
        starts the processes for chats and grammars, which otherwise start when they are needed.

        Raises the errors of `quire.errors` for what can be known without loading.
        """
        folder = await asyncio.to_thread(find_model, self.config.model, self.config.revision)
        self._model_config = read_model(self.config, folder)
        if memory is None:
            memory = max(0, available_memory() - reserved)
        self._memory_plan = plan_memory(self.config, self._model_config, memory)
        for line in self._memory_plan.describe():
            self._report(line)
        await self._client.start(Load(self.config, self._memory_plan, str(folder), self._index))
        started = time.perf_counter()
        self.default_params = read_default_params(self.config, folder)
        self.text_prompts = read_text_prompts(folder)
        self.tokenizer = await asyncio.to_thread(load_tokenizer, self.config, folder)
        if self.tokenizer is not None:
            await asyncio.to_thread(self.tokenizer.most_chars, 1)  # reads the vocabulary, before a request needs it
        try:
            self.chat_template = ChatTemplateProcess(folder, report=self._report)
            if warm:
                self.chat_template.warm()
        except CheckpointError as error:
            # The model can still complete texts.
            self._report(f"no chat: {error}")
        self._streams = RequestStreams(self.tokenizer, self._client.send)
        self._inputs = InputProcessor(
            self._model_config,
            self.tokenizer,
            max_model_len=self._memory_plan.max_model_len,
            max_logprobs=self.config.max_logprobs,
            seed=self.config.seed,
        )
        self._report(describe_tokenizer(self.tokenizer, time.perf_counter() - started))
        self.images = ImageSupport.of(self.config, self._model_config, self.tokenizer)
        self._grammar_checker = AsyncGrammarChecker(GrammarChecker.for_model(self.config, self._model_config, folder))
        if warm and self.tokenizer is not None:
            # Now, while the engine process reads its weights and no request is served yet.
            self._grammar_checker.warm()

    @property
    def vectors(self) -> "AsyncLLM":
        """The engine for embeddings and scores."""
        return self

    async def wait_ready(self) -> None:
        """Return when the engine can compute for the first time. Raises the reason if it never will."""
        await self._client.wait_ready()

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `drain_seconds`, then end the rest and the process."""
        self._client.drain()
        deadline = time.monotonic() + drain_seconds
        while len(self._streams) and self.state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._end_waits(EngineUnavailableError("the server is shutting down"))
        await self._client.shutdown()
        self.views.wake()
        for part in (self._grammar_checker, self.images, self.chat_template):
            if part is not None:
                await part.close()

    @property
    def state(self) -> str:
        """loading, ready, draining, restarting, down (waiting to restart), dead"""
        return self._client.state

    @property
    def outage(self) -> EngineUnavailableError | None:
        """Why there is no engine for a while, and until when; None if there is one or one is being started."""
        return self._client.outage

    @property
    def advances(self) -> bool:
        """Whether the engine can compute, and does so if it has work."""
        return self._client.advances

    @property
    def stats(self) -> EngineStats:
        """The latest stats of the engine process."""
        return self._throughput.stats

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

    @property
    def block_size(self) -> int:
        return self.memory_plan.block_size

    @property
    def max_queue_size(self) -> int:
        """Most requests that may wait; 0: no limit."""
        return self.config.max_queue_size

    def queue_refusal(self, tenant: str | None) -> QueueFullError | None:
        """Why a request of `tenant` (None: not known yet) would be refused for the queue's length, if it would."""
        return self._gate.refusal(self._streams.num_live, self.memory_plan.max_num_seqs, tenant)

    @property
    def engine_pid(self) -> int:
        """Process id of the engine process."""
        return self._client.pid

    # -- requests -----------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt | BegunPrompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        tap: Tap | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream deltas of one request, which add up by `RequestOutput.extend`; closing the iterator aborts it. What
        `tap` takes is not yielded.

        The first item of a prompt that another engine began repeats what that engine made.

        Raises `RequestError` before the first item for a request that cannot be served: bad input, a full queue (429),
        an engine that takes no requests now (503); and `DeadlineError` after `timeout` seconds. `request_id` is the
        caller's name for it and only echoed; an adapter is one of `adapters`.
        """
        if params.logits_processors:
            raise RequestError(
                "logits_processors are Python functions, which cannot go to another process: use LLM, or register a "
                "batch processor with the engine (--logits-processors)",
                param="logits_processors",
            )
        stream = await self._open(prompt, params, timeout=timeout, **options)
        finished = False
        try:
            if stream.replayed is not None:
                finished = stream.replayed.finished
                yield stream.replayed
            stream.tap = tap
            while not finished:
                output = await stream.next()
                finished = output.finished
                output.request_id = request_id or output.request_id
                yield output
        finally:
            self._streams.close(stream)

    async def embed(
        self,
        prompt: Prompt,
        *,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        adapter: Adapter | None = None,
        timeout: float | None = None,
    ) -> EmbeddingRequestOutput:
        """The vector of a prompt, as from `LLM.embed`; of a classifier the outputs of its head. Cancelling the call
        aborts the request.

        Raises `RequestError` as `generate` does.
        """
        stream = await self._open(
            prompt,
            embedding_params(truncate_prompt_tokens),
            task=Task.EMBED,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            adapter=adapter,
            timeout=timeout,
        )
        try:
            output = await stream.next()
        finally:
            self._streams.close(stream)
        output.request_id = request_id or output.request_id
        return make_embedding(output, normalize=self.model_config.normalizes if normalize is None else normalize)

    async def _open(
        self,
        prompt: Prompt | BegunPrompt,
        params: SamplingParams,
        *,
        task: Task = Task.SAMPLE,
        timeout: float | None,
        **options: Unpack[RequestOptions],
    ) -> Stream:
        """Check a request and send it to the engine process. The caller closes the stream."""
        if self.outage is not None:
            raise self.outage
        if self._inputs is None or self.state in ("loading", "draining", "dead"):
            raise EngineUnavailableError(f"the engine is {self.state}")
        internal_id = f"r{next(self._request_numbers)}"
        progress = NOTHING_YET
        if isinstance(prompt, BegunPrompt):
            progress, prompt = prompt.progress, prompt.token_ids
        make = partial(self._inputs.make_request, internal_id, prompt, params, task=task, **options)
        # Tokenising takes milliseconds, in which other streams must go on.
        slow = isinstance(prompt, str) or (params.bad_words and not params.bad_words_token_ids)
        request, text = await asyncio.to_thread(make) if slow else make()
        if progress:
            request = resumed(request, progress, vocab_size=self.model_config.vocab_size)
        # Before the queue: a request that never fits is not asked to come again.
        check_lengths(request, max_model_len=self.max_model_len, max_num_seqs=self.memory_plan.max_num_seqs)
        if (full := self.queue_refusal(request.tenant)) is not None:
            raise full
        if params.structured_outputs is not None and self._grammar_checker is not None:
            request = replace(request, grammar_bytes=await self._grammar_checker.check(params.structured_outputs))
        if self.state == "dead":  # since a moment ago
            raise EngineUnavailableError("the engine is dead")
        return self._streams.open(request, text, timeout, progress)

    async def register_prefix(self, prefix: Prompt, salts: Sequence[str] = ("",)) -> str:
        """Have a prefix computed before anything that waits, and kept: it is found under each of the salts.

        Returns its id when the engine has accepted it, which may be still loading until then. An engine process that
        replaces a dead one computes it again. Raises `RequestError` with the numbers if the engine cannot hold it.
        """
        if self._inputs is None or self.state in ("draining", "dead"):
            raise EngineUnavailableError(f"the engine is {self.state}")
        return await self._prefixes.register(self._inputs.token_ids_of(prefix), salts)

    def reset_prefix_cache(self) -> None:
        """Make all cached prefixes unfindable, except registered ones."""
        self._client.send(ResetPrefixCache())

    # -- called by the client -----------------------------------------------------------------------------------------

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Outputs(deltas, stats):
                self._throughput.update(stats)
                self.metrics.record_stats(stats)
                self._throughput.count_finished(self._streams.deliver(deltas))
            case PoolChanged(change):
                self.views.apply(change)
            case MemoryReported() | MemoryDescribed():
                self.questions.answer(message)
            case Refused(request_id, text, param, code):
                error = RequestError(text, param=param, code=code)
                if request_id in self._prefixes:
                    self._prefixes.refuse(request_id, error)
                else:
                    self._streams.end(request_id, error)
            case PrefixAccepted(prefix_id):
                self._prefixes.accept(prefix_id)
            case PhaseDone(name, seconds):
                self._report(f"{name}: {seconds:.2f} s")

    def _handle_death(self, death: Death) -> bool:
        self.questions.fail()
        self.views.clear()
        self._throughput.restart()
        if not death.while_loading:
            self._prefixes.count_death(death.in_step)
        return self._streams.count_death(death)

    def _resume(self) -> None:
        """Send a new engine process what the old one had."""
        self._prefixes.resend()
        self._streams.resume()
        self.views.resume()

    def _end_waits(self, error: QuireError) -> None:
        self.questions.fail()
        self.views.wake()
        self._prefixes.fail(error)
        self._streams.end_all(error)
