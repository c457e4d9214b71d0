"""An engine without a model: generates a scripted answer at a scripted speed and records its calls."""

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import quire
from quire.embeddings import EmbeddingRequestOutput, embedding_params, make_embedding
from quire.engine.chat_template import ChatTemplate
from quire.engine.image_prompt import ImageSupport
from quire.engine.input_processor import Prompt
from quire.engine.limits import check_prompt_length
from quire.engine.memory_questions import MemoryQuestions
from quire.engine.messages import ToEngine
from quire.engine.metrics import Metrics
from quire.engine.pool_views import PoolViews
from quire.engine.request_streams import Tap
from quire.engine.text_prompts import TextPrompts
from quire.engine.tokenizer import Tokenizer
from quire.errors import DeadlineError, EngineUnavailableError, QueueFullError, RequestError
from quire.lora.registry import Adapter, AdapterRegistry
from quire.model_config import ModelConfig
from quire.outputs import (
    AgeQuantiles,
    CompletionOutput,
    EngineStats,
    Logprob,
    MemoryReport,
    PositionLogprobs,
    RequestMemory,
    RequestMetrics,
    RequestOutput,
)
from quire.request import BegunPrompt
from quire.sampling_params import SamplingParams

BUNDLED = Path(quire.__file__).parent / "bundled"
ANSWER = "To be, or not to be: that is the question."


@cache
def bundled_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(BUNDLED)


class LocalTemplate:
    """A chat template rendered in this process, by default the bundled model's."""

    def __init__(self, template: ChatTemplate | None = None) -> None:
        self._template = template or ChatTemplate.from_folder(BUNDLED)
        self.source = self._template.source
        self.response_template = self._template.response_template

    async def render(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> str:
        return await asyncio.to_thread(lambda: self._template.render(messages, **options))


@dataclass
class Call:
    """One call of `generate`."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str
    tenant: str
    workload: str
    adapter: Adapter | None = None


@dataclass
class ScriptedEngine:
    """Implements `quire.server.backend.Engine`."""

    answer: str = ANSWER
    delay: float = 0.0
    """Seconds before each token."""
    endless: bool = False
    """Repeat the answer until the request is closed."""
    fail_at: int | None = None
    """Index of the token at which samples fail."""
    fails: tuple[int, ...] | None = None
    """Indices of the samples that fail there; None: all."""
    failure: str = "the logits were not finite"
    stops_at: str | None = None
    """The stop string that the last token completes."""
    raises: Exception | None = None
    """Raised by every request in place of token `raises_at`."""
    raises_at: int = 0
    full: bool = False
    load_seconds: float = 0.0
    outage: EngineUnavailableError | None = None
    stalls: bool = False
    max_model_len: int = 256
    block_size: int = 16
    max_queue_size: int = 1024
    model_config: ModelConfig = field(default_factory=lambda: ModelConfig.from_folder(BUNDLED))
    state: str = "loading"
    model_names: list[str] = field(default_factory=lambda: ["scripted", "alias"])
    adapters: AdapterRegistry = field(default_factory=AdapterRegistry)
    default_params: dict[str, Any] = field(default_factory=dict)
    other_names: list[str] = field(default_factory=list)
    text_prompts: TextPrompts = field(default_factory=TextPrompts)
    embedder: "ScriptedEngine | None" = None
    """The engine for vectors, if it is another."""
    chat_template: "LocalTemplate | None" = field(default_factory=lambda: LocalTemplate())
    tokenizer: Tokenizer | None = None
    images: ImageSupport | None = None
    metrics: Metrics = field(default_factory=lambda: Metrics("scripted"))
    prefixes: list[tuple[list[int], tuple[str, ...]]] = field(default_factory=list)
    memory: list[RequestMemory] = field(default_factory=list)
    """The requests of the memory report."""
    sent: list[ToEngine] = field(default_factory=list)
    """What viewers of the pool sent to the engine."""
    calls: list[Call] = field(default_factory=list)
    num_running: int = 0
    num_closed_early: int = 0
    num_tokens: int = 0
    """Tokens generated for all requests."""
    taps: bool = True
    num_tapped: int = 0
    """Outputs that a tap took."""

    def __post_init__(self) -> None:
        self.questions = MemoryQuestions(self.sent.append, lambda: self.state)
        self.views = PoolViews(self.sent.append, self)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(num_blocks=64)

    def queue_refusal(self, tenant: str | None) -> QueueFullError | None:
        if not self.full:
            return None
        return QueueFullError("9 requests are waiting, the limit is 9 (max_queue_size)", retry_after=7)

    async def register_prefix(self, prefix: list[int], salts: Sequence[str] = ("",)) -> str:
        if len(prefix) > self.max_model_len:
            raise RequestError(f"the prefix has {len(prefix)} tokens")
        self.prefixes.append((prefix, tuple(salts)))
        return f"prefix-{len(self.prefixes)}"

    async def start(self) -> None:
        self.tokenizer = bundled_tokenizer()

    async def wait_ready(self) -> None:
        await asyncio.sleep(self.load_seconds)
        self.state = "ready"
        self.metrics.record_stats(EngineStats(num_blocks=64, block_size=16, total_steps=1))

    async def memory_report(self) -> MemoryReport:
        stats = EngineStats(num_blocks=64, block_size=16, total_steps=1)
        return MemoryReport(stats, 0.0, AgeQuantiles(), AgeQuantiles(), self.memory)

    @property
    def vectors(self) -> "ScriptedEngine":
        return self.embedder or self

    @property
    def advances(self) -> bool:
        return self.state == "ready" and not self.stalls

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        self.state = "draining"
        deadline = time.monotonic() + drain_seconds
        while self.num_running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.state = "dead"
        while self.num_running:
            await asyncio.sleep(0.01)

    async def generate(
        self,
        prompt: str | list[int] | BegunPrompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        workload: str = "",
        adapter: Adapter | None = None,
        timeout: float | None = None,
        tap: Tap | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        assert isinstance(prompt, list), "the server tokenises"
        if self.state != "ready":
            raise EngineUnavailableError(f"the engine is {self.state}")
        if (refusal := self.queue_refusal(tenant)) is not None:
            raise refusal
        self.calls.append(Call(prompt, params, priority, cache_salt, tenant, workload, adapter))
        self.num_running += 1
        started, finished = time.monotonic(), False
        try:
            async for output in self._outputs(prompt, params):
                if timeout is not None and time.monotonic() - started > timeout:
                    raise DeadlineError(f"the request was not finished within its {timeout:g} seconds")
                if tap is not None and self.taps and _only_texts(output) and tap.ready():
                    for sample in output.outputs:
                        tap.add(sample.index, sample.text, sample.token_ids[0], time.monotonic())
                    self.num_tapped += 1
                    continue
                finished = output.finished
                yield output
        finally:
            self.num_running -= 1
            self.num_closed_early += not finished

    async def embed(
        self,
        prompt: Prompt,
        *,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        adapter: Adapter | None = None,
    ) -> EmbeddingRequestOutput:
        """The vector [number of tokens, 3, 4, 0]."""
        assert isinstance(prompt, list), "the server tokenises"
        kept = (
            prompt if truncate_prompt_tokens is None else prompt[-(truncate_prompt_tokens % (self.max_model_len + 1)) :]
        )
        check_prompt_length(len(kept), self.max_model_len, num_output=0)
        self.calls.append(Call(kept, embedding_params(), priority, cache_salt, tenant, "", adapter))
        vector = array("f", [len(kept), 3.0, 4.0, 0.0]).tobytes()
        return make_embedding(RequestOutput("r", None, kept, [], vector=vector), normalize=normalize is not False)

    def answer_to(self, prompt: list[int], params: SamplingParams) -> str:
        """The text that the engine generates for `prompt`."""
        return self.answer

    async def _outputs(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[RequestOutput]:
        tokens = bundled_tokenizer().encode(self.answer_to(prompt, params), add_special_tokens=False)
        limit = params.max_tokens or len(tokens)
        length = limit if self.endless else min(limit, len(tokens))
        metrics = RequestMetrics(arrival_time=time.monotonic(), first_scheduled_time=time.monotonic())
        if params.prompt_logprobs is not None:  # in two pieces, like those of a prompt computed in two steps
            positions = [None, *(self._position(token, params.prompt_logprobs) for token in prompt[1:])]
            yield RequestOutput("r", None, prompt, [], prompt_logprobs=positions[:1])
            yield RequestOutput("r", None, prompt, [], prompt_logprobs=positions[1:])
        for at in range(length):
            await asyncio.sleep(self.delay)
            if self.state == "dead":
                raise EngineUnavailableError("the server is shutting down")
            if self.raises is not None and at == self.raises_at:
                raise self.raises
            metrics.first_token_time = metrics.first_token_time or time.monotonic()
            metrics.last_token_time = time.monotonic()
            token, last = tokens[at % len(tokens)], at == length - 1
            output = RequestOutput("r", None, prompt, [], finished=last, num_cached_tokens=2, metrics=metrics)
            failing = range(params.n) if self.fails is None else self.fails
            for index in range(params.n):
                if self.fail_at is not None and at > self.fail_at and index in failing:
                    continue
                sample = CompletionOutput(index, bundled_tokenizer().id_to_text(token), [token])
                if params.logprobs is not None:
                    sample.logprobs = [self._position(token, params.logprobs)]
                if last:
                    sample.finish_reason = "stop" if length < limit or params.max_tokens is None else "length"
                if last and self.stops_at is not None:
                    sample.stop_reason = self.stops_at
                if at == self.fail_at and index in failing:
                    sample.finish_reason, sample.error = "error", self.failure
                output.outputs.append(sample)
            self.num_tokens += params.n
            yield output

    @staticmethod
    def _position(token: int, num_top: int) -> PositionLogprobs:
        """Log-probabilities in which the token has rank 3; ranks 1 and 2 are its neighbours."""
        tokenizer = bundled_tokenizer()
        position = {token: Logprob(-3.0, 3, tokenizer.id_to_text(token))}
        for rank in range(1, num_top + 1):
            if rank != 3:
                other = (token + rank) % 256
                position[other] = Logprob(-float(rank), rank, tokenizer.id_to_text(other))
        return position


def _only_texts(output: RequestOutput) -> bool:
    """Whether nothing but texts comes of the tokens of an output."""
    samples = output.outputs
    return bool(samples) and all(sample.finish_reason is None and sample.logprobs is None for sample in samples)
