"""PromptReader: the blocks of a request's prompt, as the engine hashes them.

A Quire server makes them: it applies the chat template, the tokenizer, the salt of the client's key and the adapter, as
it will for the answer, but computes nothing. Another engine that sends KV events is asked for the tokens alone. If
there is none, or it does not say in time, the blocks are guessed.
"""

import asyncio

import httpx
import msgspec

from quire.router.backend import Backend, BackendGoneError
from quire.router.backends import Backends
from quire.router.guess import guess_prompt, session_of
from quire.router.requests import COMPUTING, GENERATING, RoutedRequest
from quire.router.token_prompts import prompt_of, question, read_tokens
from quire.routing.fleet import Fleet
from quire.routing.policies import Prompt
from quire.server.handover import HASH_BYTES, PROMPT_HEADER, PromptBlocks

_SECONDS = 1.0
"""Longest wait for the blocks of a prompt: guessing is better than waiting."""


class PromptReader:
    """Owned by the proxy."""

    def __init__(self, fleet: Fleet, backends: Backends) -> None:
        self._fleet = fleet
        self._backends = backends

    async def read(self, request: RoutedRequest) -> Prompt:
        """The prompt of a request. Never raises: a request that cannot be read has no blocks."""
        if request.method != "POST" or request.path not in COMPUTING or not request.fields:
            return Prompt((), 1, 1)
        server = self._server() if request.path in GENERATING else None
        if server is not None:
            try:
                async with asyncio.timeout(_SECONDS):
                    ask = self._ask if server.is_quire else self._ask_tokens
                    if (asked := await ask(server, request)) is not None:
                        return asked
            except (httpx.TransportError, BackendGoneError, TimeoutError, msgspec.DecodeError):
                pass
        return guess_prompt(request.fields)

    def _server(self) -> Backend | None:
        """The Quire server with the fewest requests: another process than the engine's does this work. If there is
        none, another server whose KV events say which tokens its blocks hold."""
        servers = [
            (not backend.is_quire, replica.load.num_requests, name)
            for name, replica in self._fleet.replicas.items()
            if (backend := self._backends.by_url[name]).is_quire
            or (backend.blocks is not None and backend.blocks.block_size)
        ]
        return self._backends.by_url[min(servers)[2]] if servers else None

    @staticmethod
    async def _ask_tokens(server: Backend, request: RoutedRequest) -> Prompt | None:
        """The prompt as another engine tokenizes it; None if it does not say."""
        assert server.blocks is not None
        given = request.fields.get("prompt")
        if isinstance(given, list) and all(isinstance(each, int) for each in given):
            return (
                None if request.fields.get("cache_salt") else prompt_of(given, server.blocks.block_size, request.fields)
            )
        body = question(request.path, request.fields)
        if body is None:
            return None
        response = await server.open("POST", "/tokenize", request.headers, body)
        try:
            content = await response.aread()
        finally:
            await response.aclose()
        if response.status_code != 200:
            return None
        return prompt_of(read_tokens(content), server.blocks.block_size, request.fields)

    @staticmethod
    async def _ask(server: Backend, request: RoutedRequest) -> Prompt | None:
        """The prompt as a server reads it; None if it refuses the request."""
        headers = [*request.headers, (PROMPT_HEADER, b"blocks")]
        response = await server.open(request.method, request.target, headers, request.body)
        try:
            content = await response.aread()
        finally:
            await response.aclose()
        if response.status_code != 200:
            return None
        blocks = msgspec.json.decode(content, type=PromptBlocks)
        size = HASH_BYTES
        hashes = [int.from_bytes(blocks.hashes[at : at + size], "big") for at in range(0, len(blocks.hashes), size)]
        session = session_of(request.fields)
        return Prompt(hashes, max(1, blocks.num_tokens), blocks.block_size, session, blocks.content)
