"""Engine: the interface the server needs. `AsyncLLM` implements it, and so does the scripted engine of the tests."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol, Unpack

from quire.embeddings import EmbeddingRequestOutput
from quire.engine.image_prompt import ImageSupport
from quire.engine.input_processor import Prompt, RequestOptions
from quire.engine.memory_questions import MemoryQuestions
from quire.engine.metrics import Metrics
from quire.engine.pool_views import PoolViews
from quire.engine.request_streams import Tap
from quire.engine.text_prompts import TextPrompts
from quire.engine.tokenizer import Tokenizer
from quire.errors import EngineUnavailableError, QueueFullError
from quire.lora.registry import Adapter, AdapterRegistry
from quire.model_config import ModelConfig
from quire.outputs import MemoryReport, RequestOutput
from quire.request import BegunPrompt
from quire.sampling_params import SamplingParams


class ChatRenderer(Protocol):
    """The model's chat template; `quire.engine.chat_template.ChatTemplate.render` without blocking the event loop."""

    @property
    def source(self) -> str: ...
    @property
    def response_template(self) -> str: ...
    async def render(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> str: ...


class Engine(Protocol):
    """An engine that may still be loading: `tokenizer` is None until it is loaded."""

    @property
    def state(self) -> str: ...
    @property
    def advances(self) -> bool: ...
    @property
    def outage(self) -> EngineUnavailableError | None: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def chat_template(self) -> ChatRenderer | None: ...
    @property
    def images(self) -> ImageSupport | None: ...
    @property
    def model_names(self) -> list[str]: ...
    @property
    def adapters(self) -> AdapterRegistry: ...
    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def vectors(self) -> "Engine":
        """The engine for embeddings and scores: this one, unless another model serves them."""
        ...

    @property
    def other_names(self) -> Sequence[str]:
        """Names of a model that serves the other endpoints beside this one."""
        ...

    @property
    def max_model_len(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def max_queue_size(self) -> int: ...
    def queue_refusal(self, tenant: str | None) -> QueueFullError | None:
        """Why a request of `tenant` (None: not known yet) would be refused for the queue's length, if it would."""
        ...

    @property
    def default_params(self) -> Mapping[str, Any]: ...
    @property
    def text_prompts(self) -> TextPrompts: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def questions(self) -> MemoryQuestions: ...
    @property
    def views(self) -> PoolViews: ...

    def generate(
        self,
        prompt: str | list[int] | BegunPrompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        tap: Tap | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[RequestOutput, None]: ...

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
    ) -> EmbeddingRequestOutput: ...

    async def register_prefix(self, prefix: list[int], salts: Sequence[str] = ("",)) -> str: ...
    async def memory_report(self) -> MemoryReport: ...
    async def start(self) -> None: ...
    async def wait_ready(self) -> None: ...
    async def shutdown(self, drain_seconds: float = 0.0) -> None: ...
