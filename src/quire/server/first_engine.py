"""FirstEngine: what one of several engines answers for all: everything that is neither a request nor their life."""

from collections.abc import Mapping, Sequence
from typing import Any

from quire.engine.async_engine import AsyncLLM
from quire.engine.image_prompt import ImageSupport
from quire.engine.memory_questions import MemoryQuestions
from quire.engine.metrics import Metrics
from quire.engine.pool_views import PoolViews
from quire.engine.text_prompts import TextPrompts
from quire.engine.tokenizer import Tokenizer
from quire.errors import QueueFullError
from quire.lora.registry import AdapterRegistry
from quire.model_config import ModelConfig
from quire.outputs import MemoryReport
from quire.server.backend import ChatRenderer


class FirstEngine:
    """A part of `quire.server.backend.Engine`."""

    def __init__(self, first: AsyncLLM) -> None:
        self._first = first
        self.other_names: Sequence[str] = first.other_names

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

    async def memory_report(self) -> MemoryReport:
        return await self._first.memory_report()
