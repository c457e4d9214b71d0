"""Partners of a conversation on the terminal: a model that this program loads, or any server with OpenAI's API."""

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from quire.cli.http_client import Target, check_url
from quire.config import EngineConfig
from quire.errors import QuireError
from quire.sampling_params import SamplingParams

Messages = list[dict[str, str]]


class Partner(Protocol):
    """A model that answers: one in this program, or a server."""

    async def start(self) -> str:
        """Get ready. Returns the name to show. Raises `QuireError` if that is impossible."""
        ...

    def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        """The next message in pieces. Closing the generator stops the generation."""
        ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """Flags of `quire chat` that go into the sampling parameters of each answer."""

    max_tokens: int | None = None
    """Maximum tokens of an answer."""
    temperature: float | None = None
    """0 is greedy. Defaults to the model's generation_config.json."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    seed: int | None = None
    """Seed of the sampling: the same seed gives the same answers."""


class LocalModel:
    """A model that this program loads; it computes in a child process."""

    def __init__(self, config: EngineConfig, given: dict[str, Any]) -> None:
        from quire.engine.async_engine import AsyncLLM

        self._engine = AsyncLLM(config, report=lambda line: print(line, file=sys.stderr))
        self._given = given

    async def start(self) -> str:
        await self._engine.start()
        await self._engine.wait_ready()
        return self._engine.model_names[0]

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        template, tokenizer = self._engine.chat_template, self._engine.tokenizer
        if template is None or tokenizer is None:
            raise QuireError("the model has no chat template; `quire generate` continues a text")
        prompt = tokenizer.encode(await template.render(messages), add_special_tokens=False)
        params = SamplingParams(**{"max_tokens": None, **self._engine.default_params, **self._given})
        async with aclosing(self._engine.generate(prompt, params)) as outputs:
            async for output in outputs:
                for sample in output.outputs:
                    yield sample.text

    async def stop(self) -> None:
        await self._engine.shutdown()


class ServerPartner:
    """Any server with OpenAI's API."""

    def __init__(self, url: str, model: str, api_key: str | None, given: dict[str, Any]) -> None:
        check_url(url)
        base = url.rstrip("/")
        base += "" if urlsplit(base).path else "/v1"
        self._target = Target(f"{base}/chat/completions", api_key)
        self._body = {**({"model": model} if model else {}), **given, "stream": True}
        self._name = model or url

    async def start(self) -> str:
        await self._target.check()
        return self._name

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        async with aclosing(self._target.events({**self._body, "messages": messages})) as events:
            async for event in events:
                for choice in event.get("choices", ()):
                    yield (choice.get("delta") or {}).get("content") or ""

    async def stop(self) -> None:
        pass
