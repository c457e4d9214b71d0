"""Prefill: the servers that compute prompts for those that answer (prefill and decode apart).

A long prompt goes to one of them first. The server that answers then fetches the prompt's blocks from its engine
(`quire.runner.peer_blocks`). Whatever fails here costs time alone: the server that answers computes the prompt itself.
"""

import asyncio
import logging
from dataclasses import replace

import httpx

from quire.router.backend import BackendGoneError
from quire.router.backends import Backends
from quire.router.requests import GENERATING, RoutedRequest
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES, Prompt
from quire.routing.replica import Work
from quire.server.handover import COMPUTE, PROMPT_HEADER

logger = logging.getLogger(__name__)


class Prefill:
    """Owned by the proxy."""

    def __init__(self, settings: RouterSettings) -> None:
        own = replace(settings, backends=settings.prefill, backends_file=None, decode=(), prefill=(), kv_events=())
        self.fleet = Fleet(
            POLICIES[settings.policy](), max_blocks=settings.max_blocks, max_requests=settings.max_backend_requests
        )
        self.backends = Backends(own, self.fleet)
        self.num_prompts = 0
        """Prompts that were computed since the start."""
        self._min_tokens = settings.prefill_min_tokens
        self._seconds = settings.prefill_timeout

    def is_worth(self, request: RoutedRequest, work: Work) -> bool:
        """Whether so much of a prompt is new to the server that will answer that another one should compute it."""
        return (
            request.method == "POST"
            and request.path in GENERATING
            and not request.answer.progress
            and work.num_new_tokens >= self._min_tokens
        )

    async def compute(self, request: RoutedRequest, prompt: Prompt, models: tuple[str, ...]) -> bool:
        """Let a server compute the prompt of a request to servers of `models`. Returns whether one has."""
        others = {
            url for url, each in self.backends.by_url.items() if not each.is_quire or each.models[:1] != models[:1]
        }
        work = self.fleet.choose(prompt, others)
        if work is None:
            return False
        backend = self.backends.by_url[work.replica.name]
        try:
            async with asyncio.timeout(self._seconds):
                headers = [*request.headers, (PROMPT_HEADER, COMPUTE)]
                response = await backend.open(request.method, request.target, headers, request.body)
                try:
                    await response.aread()
                finally:
                    await response.aclose()
        except (httpx.TransportError, BackendGoneError, TimeoutError) as error:
            logger.warning("%s did not compute a prompt: %s", backend.url, str(error) or type(error).__name__)
            if isinstance(error, httpx.ConnectError):
                self.backends.lose(backend, "it does not answer (ConnectError)")
            return False
        finally:
            self.fleet.end(work)
        self.num_prompts += response.status_code == 200
        return response.status_code == 200

    async def watch(self) -> None:
        """Look at all servers for ever. None must be there at the start."""
        await asyncio.gather(*(self.backends.look(backend) for backend in self.backends.by_url.values()))
        await self.backends.watch()
