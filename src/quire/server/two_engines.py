"""TwoEngines: a model that generates and one that makes vectors behind one server, each with a process and a pool.

The system shares the cores between both processes. The second takes half of the threads, so that a long batch of texts
leaves the stream of tokens at least as many cores as it takes itself.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from quire.embeddings import EmbeddingRequestOutput
from quire.engine.async_engine import AsyncLLM
from quire.engine.input_processor import Prompt
from quire.errors import ConfigError, EngineUnavailableError
from quire.outputs import RequestOutput
from quire.request import BegunPrompt
from quire.sampling_params import SamplingParams
from quire.server.first_engine import FirstEngine


class TwoEngines(FirstEngine):
    """Implements `quire.server.backend.Engine`: the first engine, whose `vectors` is the second."""

    def __init__(self, first: AsyncLLM, second: AsyncLLM) -> None:
        """Raises `ConfigError` if both have a name in common."""
        if shared := set(first.model_names) & set(second.model_names):
            raise ConfigError(
                f"embedding_model and model are both served as {min(shared)!r}; give one another served_model_name"
            )
        first.other_names, second.other_names = second.model_names, first.model_names
        super().__init__(first)
        self.vectors = second

    @property
    def state(self) -> str:
        """The state of the first, once the second is loaded."""
        return "loading" if self.vectors.state == "loading" else self._first.state

    @property
    def advances(self) -> bool:
        return self._first.advances and self.state != "loading"

    @property
    def outage(self) -> EngineUnavailableError | None:
        return self._first.outage

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

    async def start(self) -> None:
        """Start both; the second plans with the memory that the first leaves."""
        await self._first.start()
        await self.vectors.start(reserved=self._first.memory_plan.total)

    async def wait_ready(self) -> None:
        await asyncio.gather(self._first.wait_ready(), self.vectors.wait_ready())

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        await asyncio.gather(self._first.shutdown(drain_seconds), self.vectors.shutdown(drain_seconds))
