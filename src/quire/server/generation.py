"""Generation: all prompts of one HTTP request as one stream of outputs. UsageCounter: the tokens it took."""

import asyncio
from asyncio import Queue, Task
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import msgspec

from quire.engine.metrics import Metrics
from quire.engine.request_streams import Tap
from quire.errors import EngineUnavailableError
from quire.lora.registry import Adapter
from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.request import BegunPrompt, PrefilledPrompt, SampleProgress
from quire.sampling_params import SamplingParams
from quire.server.adapters import find_adapter
from quire.server.backend import Engine
from quire.server.errors import SampleFailedError, naming
from quire.server.key_use import Admission
from quire.server.replies import CompletionTokensDetails, PromptTokensDetails, Usage
from quire.server.scheduling_info import SchedulingInfo
from quire.server.traces import TracedAnswer

_STARTED_TOGETHER = 16
"""Prompts of a request that are started without a pause for other requests."""


@dataclass(frozen=True, slots=True)
class Generation:
    """All prompts of one HTTP request, and the parameters they are continued with."""

    prompts: list[list[int]]
    params: SamplingParams
    scheduling: SchedulingInfo
    timeout: float | None = None
    """Seconds after which each prompt's request is ended with an error."""
    progress: Mapping[int, SampleProgress] = field(default_factory=dict)
    """Choices that another server began, by index."""
    sent_names: Mapping[str, str] = field(default_factory=dict)
    """Names of `params` → the fields in which the client sent them, where these differ. Errors say the latter."""

    def named(self, names: Mapping[str, str]) -> "Generation":
        """The same for an endpoint that calls the fields `names`, by our names or by those that a chat sends."""
        sent = {ours: names.get(name, name) for ours, name in self.sent_names.items()}
        return replace(self, sent_names={**names, **sent})

    def prefilled(self) -> "Generation":
        """The same, of prompts that another server computed. Those with images are computed here."""
        prompts = [PrefilledPrompt(prompt) if type(prompt) is list else prompt for prompt in self.prompts]
        return replace(self, prompts=prompts)

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    def content(self, adapter: str) -> bytes:
        """A digest of the prompts and parameters, without the seed and the client; `adapter` is the adapter's."""
        params = self.params.with_changes(seed=None)
        images = [getattr(prompt, "inputs", ()) for prompt in self.prompts]
        return blake2b(msgspec.msgpack.encode((self.prompts, params, adapter, images)), digest_size=16).digest()

    async def run(self, engine: Engine, tap: Tap | None = None) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield (index of the prompt, its new output). Raises the refusals of API key and engine, and the error of a
        sample that failed if it is the only one: among several it ends alone, with its error. With one prompt, `tap`
        takes what it can, which is not yielded."""
        params = await self._with_bad_words(engine)
        adapter = await find_adapter(engine, self.scheduling.adapter)
        num_tokens = sum(map(len, self.prompts))
        with self.scheduling.use.admit(len(self.prompts), num_tokens, engine.max_queue_size) as admission:
            tap = tap if len(self.prompts) == 1 else None
            prompts = range(len(self.prompts))
            streams = [self._generate(engine, index, params, adapter, admission, tap) for index in prompts]
            async with aclosing(_numbered(streams[0]) if len(streams) == 1 else _merged(streams)) as items:
                with naming(self.sent_names):
                    async for index, output in items:
                        for sample in output.outputs:
                            _check(sample, is_only=self.num_choices == 1)
                        yield index, output

    async def _with_bad_words(self, engine: Engine) -> SamplingParams:
        """The parameters with the tokens of their bad words, found once for all prompts."""
        words, tokenizer = self.params.bad_words, engine.tokenizer
        if not words or tokenizer is None:
            return self.params
        token_ids = await asyncio.to_thread(tokenizer.bad_word_ids, words)
        return self.params.with_changes(bad_words_token_ids=token_ids)

    def _progress_of(self, prompt_index: int) -> dict[int, SampleProgress]:
        """The samples of a prompt that another server began."""
        n, first = self.params.n, prompt_index * self.params.n
        return {choice - first: sample for choice, sample in self.progress.items() if 0 <= choice - first < n}

    async def _generate(
        self,
        engine: Engine,
        index: int,
        params: SamplingParams,
        adapter: Adapter | None,
        admission: Admission,
        tap: Tap | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        progress = self._progress_of(index)
        watch = RequestWatch(engine.metrics, self.params)
        outputs = engine.generate(
            BegunPrompt(self.prompts[index], progress) if progress else self.prompts[index],
            params,
            priority=self.scheduling.priority,
            cache_salt=self.scheduling.cache_salt,
            tenant=self.scheduling.tenant,
            workload=self.scheduling.workload,
            adapter=adapter,
            timeout=self.timeout,
            tap=None if tap is None else _counted(tap, watch, admission),
        )
        span = None if self.scheduling.trace is None else self.scheduling.trace.begin()
        prompt_logprobs: list[PositionLogprobs | None] | None = None
        try:
            async for output in outputs:
                if watch.last is None:
                    admission.note_first()
                admission.note_tokens(watch.note(output))
                # The log-probabilities of a long prompt arrive in pieces before any token. Send them with the first.
                if output.prompt_logprobs is not None:
                    prompt_logprobs = (prompt_logprobs or []) + output.prompt_logprobs
                if output.outputs:
                    output.prompt_logprobs, prompt_logprobs = prompt_logprobs, None
                    yield output
        finally:
            watch.end()
            if span is not None:
                span.end(watch.answer(len(self.prompts[index])))
            # A dropped async generator is closed some time later, and its request would run on until then.
            await outputs.aclose()


def _counted(tap: Tap, watch: "RequestWatch", admission: Admission) -> Tap:
    """`tap`, with what it takes counted. It runs for every token of a server, so it calls little."""
    take, observe_gap, use = tap.add, watch.metrics.observe_token_gap, admission.use
    is_limited = use.key.tokens_per_minute is not None

    def add(index: int, text: str, token_id: int, now: float) -> None:
        last = watch.last_token_time
        if last and now > last:  # with several samples, those of one step have no time between them
            observe_gap(now - last)
        watch.last_token_time = now
        watch.num_tokens += 1
        if is_limited:
            admission.note_tokens(1)
        else:
            use.num_generated_tokens += 1
        take(index, text, token_id, now)

    return Tap(tap.ready, add)


@dataclass(slots=True)
class RequestWatch:
    """Counts one request of the engine for the metrics."""

    metrics: Metrics
    params: SamplingParams
    last: RequestOutput | None = None
    last_token_time: float = 0.0
    num_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def note(self, output: RequestOutput) -> int:
        """Count a new output, and return the number of its tokens. Tokens that arrive together share the time since
        the previous ones."""
        num_new = 0
        for sample in output.outputs:  # usually one: loops are cheaper than sums
            num_new += len(sample.token_ids)
            if sample.finish_reason is not None:
                self.finish_reasons.append(sample.finish_reason)
        now = output.metrics.last_token_time if output.metrics is not None else None
        if num_new and now is not None:
            if self.last_token_time:
                self.metrics.observe_token_gap((now - self.last_token_time) / -(-num_new // self.params.n))
            self.last_token_time = now
        self.num_tokens += num_new
        self.last = output
        return num_new

    def end(self) -> None:
        """Count the request. Samples that have not finished count as aborted."""
        if self.last is None or self.last.metrics is None:
            return
        unfinished = self.params.n - len(self.finish_reasons)
        self.metrics.observe_request(
            self.last.metrics,
            finish_reasons=self.finish_reasons + ["abort"] * unfinished,
            num_prompt_tokens=len(self.last.prompt_token_ids),
            num_generated_tokens=self.num_tokens,
            n=self.params.n,
            max_tokens=self.params.max_tokens,
        )

    def answer(self, num_prompt_tokens: int) -> TracedAnswer:
        """The request as its span tells it."""
        last = self.last
        return TracedAnswer(
            params=self.params,
            finish_reasons=self.finish_reasons,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=0 if last is None else last.num_cached_tokens,
            num_generated_tokens=self.num_tokens,
            times=None if last is None else last.metrics,
        )


@dataclass(slots=True)
class UsageCounter:
    """Counts tokens for the `usage` field."""

    counts_output: bool = True
    """False where generated tokens are dropped."""
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Tokens of the reasoning among them; counted when the answer ends."""

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count a new output of prompt `prompt_index`."""
        self.prompt_tokens[prompt_index] = len(output.prompt_token_ids)
        self.cached_tokens[prompt_index] = output.num_cached_tokens
        if self.counts_output:
            for sample in output.outputs:
                self.completion_tokens += len(sample.token_ids)

    def usage(self) -> Usage:
        """The tokens counted so far, as OpenAI's object."""
        prompt_tokens = sum(self.prompt_tokens.values())
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self.cached_tokens.values())),
        )
        if self.reasoning_tokens:
            usage.completion_tokens_details = CompletionTokensDetails(self.reasoning_tokens)
        return usage


def sample_error(sample: CompletionOutput) -> SampleFailedError:
    """The error of a sample that ended with one."""
    return SampleFailedError(sample.error or "the sample could not be drawn")


def _check(sample: CompletionOutput, *, is_only: bool) -> None:
    if sample.finish_reason == "error" and is_only:
        raise sample_error(sample)
    if sample.finish_reason == "abort":
        raise EngineUnavailableError("the request was ended before its answer was complete; send it again")


async def _numbered(
    stream: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    async with aclosing(stream):
        async for output in stream:
            yield 0, output


async def _merged(
    streams: list[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Items of all streams in the order they arrive. The first error ends all. At most one item per stream is held."""
    arrived: Queue[tuple[int, RequestOutput] | Exception | None] = Queue(maxsize=1)
    tasks: list[Task[None]] = []
    try:
        for index, stream in enumerate(streams):
            tasks.append(asyncio.create_task(_pump(index, stream, arrived)))
            if index % _STARTED_TOGETHER == 0:
                await asyncio.sleep(0)  # starting hundreds at once would delay other requests
        running = len(tasks)
        while running:
            item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        await _cancel_all(tasks)


async def _pump(
    index: int,
    stream: AsyncGenerator[RequestOutput, None],
    arrived: "Queue[tuple[int, RequestOutput] | Exception | None]",
) -> None:
    try:
        async with aclosing(stream):
            async for output in stream:
                await arrived.put((index, output))
    except Exception as error:
        await arrived.put(error)
    else:
        await arrived.put(None)


async def _cancel_all(tasks: list[Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
