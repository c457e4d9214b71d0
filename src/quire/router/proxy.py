"""Proxy: one request from client to server and back, and on to another server if the first one dies.

A request is sent again only where that changes nothing for the client: it was never sent, or it only computes and the
client has nothing of the answer yet, or the answer is a marked stream. Then another server goes on behind the last
mark that was passed on, so the client gets every event once.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import httpx
from starlette.types import Receive, Scope, Send

from quire.errors import EngineUnavailableError, QuarantinedError, QueueFullError, RequestError
from quire.router.backend import Backend, BackendGoneError, EngineAwayError
from quire.router.backends import Backends
from quire.router.client_answer import ClientAnswer, Headers, failure_event
from quire.router.homes import RESPONSES, Homes
from quire.router.marked_stream import BrokenStreamError
from quire.router.prefill import Prefill
from quire.router.prompts import PromptReader
from quire.router.quarantine import REFUSED_SECONDS, DeadlyRequests
from quire.router.requests import HOP_BY_HOP, RoutedRequest, read_request
from quire.router.settings import RouterSettings
from quire.router.waiting_room import WaitingRoom
from quire.routing.fleet import Fleet
from quire.routing.replica import Work
from quire.server.handover import STREAM_HEADER
from quire.server.streaming import while_connected

logger = logging.getLogger(__name__)

_BUSY = 429
_AWAY = (502, 503, 504)
_QUARANTINED = b'"code":"request_quarantined"'
"""In an error body or event. No text of a model holds it: JSON escapes the quotation marks."""
_MOST_TRIES = 16
"""Servers that one request is sent to, whatever happens there."""
_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
"""Seconds before servers are tried again, longer with each try."""


@dataclass(slots=True)
class Counts:
    """What the router has done since it started."""

    requests: int = 0
    moved: int = 0
    """Times that a request went on to another server."""
    resumed_streams: int = 0
    """Among them, streams whose beginning the client already had."""
    mixed_streams: int = 0
    """Among them, streams that went on at a server of another version: there was none of the same."""
    cut_streams: int = 0
    """Streams that ended with an error of the router."""


class _MoveOnError(Exception):
    """A server did not answer the request, or not to the end; another one can."""

    def __init__(self, reason: str, *, died: bool = False, reply: "_Reply | None" = None) -> None:
        super().__init__(reason)
        self.died = died
        self.reply = reply


@dataclass(frozen=True, slots=True)
class _Reply:
    """The whole response of a server."""

    status: int
    headers: Headers
    body: bytes
    replica: str

    async def send(self, answer: ClientAnswer) -> None:
        length = (b"content-length", str(len(self.body)).encode())
        await answer.begin(self.status, [*self.headers, length], self.replica)
        await answer.end(self.body)


class Proxy:
    """Owned by the application."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, backends: Backends) -> None:
        self.waiting = WaitingRoom(fleet, backends, max_size=settings.max_queue_size, seconds=settings.server_timeout)
        self.counts = Counts()
        self._settings = settings
        self._fleet = fleet
        self._backends = backends
        self._prompts = PromptReader(fleet, backends)
        self._deadly = DeadlyRequests(time.monotonic)
        self._homes = Homes()
        self.prefill = Prefill(settings) if settings.prefill else None

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises `RequestError` as long as the client has nothing of an answer."""
        request = await read_request(scope, receive, self._settings.max_body_size)
        self.counts.requests += 1
        await while_connected(receive, self._answer(request, ClientAnswer(send)))

    async def _answer(self, request: RoutedRequest, answer: ClientAnswer) -> None:
        try:
            await self._try_servers(request, answer)
        except RequestError as error:
            if not answer.has_begun:
                raise
            self.counts.cut_streams += 1
            await answer.end(failure_event(request.path, error))

    async def _try_servers(self, request: RoutedRequest, answer: ClientAnswer) -> None:
        prompt = await self._prompts.read(request)
        request.content = prompt.content or request.digest()
        self._deadly.check(request.content)
        tried: set[str] = set()
        last = _MoveOnError("there is none")
        attempt = 0
        while attempt < _MOST_TRIES:
            if tried and tried.issuperset(self._fleet.replicas):
                if last.reply is not None and last.reply.status == _BUSY:
                    break  # all are busy: the client waits, not the router
                await asyncio.sleep(min(_LONGEST_PAUSE, _PAUSE * attempt))
                if tried.issuperset(self._fleet.replicas):  # no other has come: the same may have recovered
                    tried.clear()
            home = self._homes.of(request, [url for url in self._backends.by_url if url in self._fleet.replicas])
            others = self._fleet.replicas.keys() - {home} if home in self._fleet.replicas else set()
            others = (set() if home in tried else others) | self._other_versions(request, tried)
            work = await self.waiting.enter(prompt, tried | others, patient=answer.has_begun)
            backend = self._backends.by_url[work.replica.name]
            before = request.answer.num_tokens
            try:
                if self.prefill is not None and not request.prefilled and self.prefill.is_worth(request, work):
                    request.prefilled = await self.prefill.compute(request, prompt, backend.models)
                await self._try(request, backend, work, answer)
                return
            except _MoveOnError as error:
                last = error
                attempt += 1
                if request.answer.num_tokens > before:  # it came on there: what went wrong earlier does not count
                    attempt, request.num_deaths = 1, 0
                    tried.clear()
                tried.add(backend.url)
                self._count_move(request, backend, error)
            finally:
                self.waiting.leave(work)
        if last.reply is not None and not answer.has_begun:
            await last.reply.send(answer)
        elif last.reply is not None and last.reply.status == _BUSY:
            raise QueueFullError("all servers have as many requests as they take", retry_after=1)
        else:
            raise EngineUnavailableError(f"no server could answer the request; of the last: {last}", retry_after=5)

    def _other_versions(self, request: RoutedRequest, tried: set[str]) -> set[str]:
        """The servers that may continue a stream with other tokens, as long as one is left that does not."""
        if not request.answer.progress:
            return set()
        other = {url for url in self._fleet.replicas if self._backends.by_url[url].version != request.version}
        return other if self._fleet.replicas.keys() - other - tried else set()

    async def _try(self, request: RoutedRequest, backend: Backend, work: Work, answer: ClientAnswer) -> None:
        """Send the request to one server, and its answer to the client. Raises `_MoveOnError`."""
        resumable = backend.is_quire and request.streams
        self._homes.note(request, backend.url)
        if answer.has_begun and not resumable:
            raise _MoveOnError(f"{backend.url} cannot go on with an answer that another server began")
        headers, body = request.to_send(handover=resumable or (backend.is_quire and request.path == RESPONSES))
        try:
            response = await backend.open(request.method, request.target, headers, body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._backends.lose(backend, f"it does not answer ({type(error).__name__})")
            raise _MoveOnError("it cannot be reached") from error
        except BackendGoneError as error:
            if not request.only_computes:
                raise EngineUnavailableError(f"{error}; what was asked may be done, so it is not sent again") from error
            raise _MoveOnError(str(error), died=True) from error
        try:
            await self._pass_on(request, backend, response, work, answer)
        except (BackendGoneError, EngineAwayError, BrokenStreamError) as error:
            if not request.only_computes or answer.is_unmarked or (answer.has_begun and not resumable):
                raise EngineUnavailableError(f"the server ended before its answer was complete: {error}") from error
            request.answer.cut()
            raise _MoveOnError(str(error), died=isinstance(error, BackendGoneError)) from error
        finally:
            await response.aclose()

    async def _pass_on(
        self, request: RoutedRequest, backend: Backend, response: httpx.Response, work: Work, answer: ClientAnswer
    ) -> None:
        """Pass a response on, as it comes or as a whole. Raises `_MoveOnError` for one that says: not here."""
        status, headers = response.status_code, _kept_headers(response)
        is_refusal = status == _BUSY or status in _AWAY or (answer.has_begun and status != 200)
        is_whole = not request.streams or response.headers.get("content-type", "").startswith("application/json")
        if (is_refusal or is_whole) and request.only_computes:
            reply = _Reply(status, headers, b"".join([part async for part in backend.parts(response)]), backend.url)
            if is_refusal:
                raise _MoveOnError(f"it says {status}", reply=reply)
            self._note_quarantine(request, reply.body)
            self._fleet.add_tokens(work, 1)
            await reply.send(answer)
        elif STREAM_HEADER.decode() in response.headers:
            if not answer.has_begun:
                await answer.begin(status, headers, backend.url)
            await self._pass_marked(request, backend, response, work, answer)
        else:
            async for part in backend.parts(response):
                if not answer.has_begun:
                    await answer.begin(status, headers, backend.url)
                self._fleet.add_tokens(work, part.count(b"\ndata:") + 1)
                self._note_quarantine(request, part)
                answer.is_unmarked = True
                await answer.write(part)
            if not answer.has_begun:
                await answer.begin(status, headers, backend.url)
            await answer.end()

    async def _pass_marked(
        self, request: RoutedRequest, backend: Backend, response: httpx.Response, work: Work, answer: ClientAnswer
    ) -> None:
        marked = request.answer
        if marked.progress:
            self.counts.resumed_streams += 1
            self.counts.mixed_streams += backend.version != request.version
        request.version = backend.version
        # An engine may have died of a request that has no tokens of it: that one stays, and the server finds out.
        first = marked.num_tokens
        async for part in backend.parts(response, lambda: marked.num_tokens > first):
            before = marked.num_tokens
            for events in marked.feed(part):
                await answer.write(events)
            if marked.num_tokens > before:
                self._fleet.add_tokens(work, marked.num_tokens - before)
        last = marked.end()
        self._note_quarantine(request, last)
        await answer.end(last)

    def _note_quarantine(self, request: RoutedRequest, data: bytes) -> None:
        """A server says that its engine dies of a request: no other server shall find that out again."""
        if _QUARANTINED in data:
            self._deadly.add(request.content)

    def _count_move(self, request: RoutedRequest, backend: Backend, error: _MoveOnError) -> None:
        """A request leaves a server. Raises `QuarantinedError` if too many died of it."""
        self.counts.moved += 1
        logger.warning("a request moves on from %s: %s", backend.url, error)
        request.num_deaths += error.died
        if request.num_deaths >= self._settings.max_deaths:
            self._deadly.add(request.content)
            raise QuarantinedError(
                f"{request.num_deaths} servers died while they computed this request (--max-deaths); requests like it "
                f"are refused for {REFUSED_SECONDS:.0f} s"
            )


def _kept_headers(response: httpx.Response) -> Headers:
    dropped = HOP_BY_HOP | {b"content-length", STREAM_HEADER, b"date"}
    headers = [(name.lower(), value) for name, value in response.headers.raw]
    return [header for header in headers if header[0] not in dropped]
