"""TwoEngines: a model that generates and one that makes vectors behind one server, each with a process and a pool.

The system shares the cores between both processes. The second takes half of the threads, so that a long batch of texts
leaves the stream of tokens at least as many cores as it takes itself.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from quire.embeddings import EmbeddingRequestOutput
from quire.engine.async_engine import AsyncLLM
from quire.engine.image_prompt import ImageSupport
from quire.engine.input_processor import Prompt
from quire.engine.memory_questions import MemoryQuestions
from quire.engine.metrics import Metrics
from quire.engine.pool_views import PoolViews
from quire.engine.text_prompts import TextPrompts
from quire.engine.tokenizer import Tokenizer
from quire.errors import ConfigError, EngineUnavailableError, QueueFullError
from quire.lora.registry import AdapterRegistry
from quire.model_config import ModelConfig
from quire.outputs import MemoryReport, RequestOutput
from quire.request import BegunPrompt
from quire.sampling_params import SamplingParams
from quire.server.backend import ChatRenderer


class TwoEngines:
    """Implements `quire.server.backend.Engine`: the first engine, whose `vectors` is the second."""

    def __init__(self, first: AsyncLLM, second: AsyncLLM) -> None:
        """Raises `ConfigError` if both have a name in common."""
        if shared := set(first.model_names) & set(second.model_names):
            raise ConfigError(
                f"embedding_model and model are both served as {min(shared)!r}; give one another served_model_name"
            )
        self._first = first
        self.vectors = second
        first.other_names, second.other_names = second.model_names, first.model_names
        self.other_names: Sequence[str] = second.model_names

    @property
    def state(self) -> str:
        """The state of the first, once the second is loaded."""
        return "loading" if self.vectors.state == "loading" else self._first.state

    @property
    def advances(self) -> bool:
        return self._first.advances

    @property
    def outage(self) -> EngineUnavailableError | None:
        return self._first.outage

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._first.tokenizer

    @property
    def chat_template(self) -> ChatRenderer | None:
        return self._first.chat_template

    @property
    def images(self) -> ImageSupport | None:
        return self._first.images

    @property
    def model_names(self) -> list[str]:
        return self._first.model_names

    @property
    def adapters(self) -> AdapterRegistry:
        return self._first.adapters

    @property
    def model_config(self) -> ModelConfig:
        return self._first.model_config

    @property
    def block_size(self) -> int:
        return self._first.block_size

    @property
    def max_model_len(self) -> int:
        return self._first.max_model_len

    @property
    def max_queue_size(self) -> int:
        return self._first.max_queue_size

    def queue_refusal(self, tenant: str | None) -> QueueFullError | None:
        return self._first.queue_refusal(tenant)

    @property
    def default_params(self) -> Mapping[str, Any]:
        return self._first.default_params

    @property
    def text_prompts(self) -> TextPrompts:
        return self._first.text_prompts

    @property
    def metrics(self) -> Metrics:
        return self._first.metrics

    @property
    def questions(self) -> MemoryQuestions:
        return self._first.questions

    @property
    def views(self) -> PoolViews:
        return self._first.views

    def generate(
        self, prompt: str | list[int] | BegunPrompt, params: SamplingParams, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate` of the first."""
        return self._first.generate(prompt, params, **options)

    async def embed(self, prompt: Prompt, **options: Any) -> EmbeddingRequestOutput:
        """As `AsyncLLM.embed` of the second."""
        return await self.vectors.embed(prompt, **options)

    async def register_prefix(self, prefix: list[int], salts: Sequence[str] = ("",)) -> str:
        return await self._first.register_prefix(prefix, salts)

    async def memory_report(self) -> MemoryReport:
        return await self._first.memory_report()

    async def start(self) -> None:
        """Start both; the second plans with the memory that the first leaves."""
        await self._first.start()
        await self.vectors.start(reserved=self._first.memory_plan.total)

    async def wait_ready(self) -> None:
        await asyncio.gather(self._first.wait_ready(), self.vectors.wait_ready())

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        await asyncio.gather(self._first.shutdown(drain_seconds), self.vectors.shutdown(drain_seconds))
