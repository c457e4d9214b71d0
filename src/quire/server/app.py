"""The ASGI application: the table of endpoints, and the middleware that every request passes.

The middleware checks the size of the headers, the origin, the host and the API key (every route that is not public
needs one), then calls the endpoint. Any error becomes an OpenAI error body. Each response carries the request's id.
"""

import time
import uuid
from collections.abc import Collection, Mapping
from email.utils import formatdate

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.errors import RequestError
from quire.server import (
    adapters,
    chat,
    completions,
    embeddings,
    health,
    infill,
    kv,
    logs,
    metrics,
    models,
    openapi,
    page_files,
    scores,
    tokenize,
)
from quire.server.anthropic import endpoints as anthropic
from quire.server.auth import DEFAULT_ORIGINS, Authenticator, Client
from quire.server.backend import Engine
from quire.server.batches.endpoints import endpoints as batch_endpoints
from quire.server.batches.service import BatchService
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import OPENAI_ERRORS, ErrorForm, Refusal, as_request_error, error_headers
from quire.server.generation import UsageCounter
from quire.server.hosts import HostList
from quire.server.key_use import KeyRing
from quire.server.limits import ClientGoneError, check_headers
from quire.server.memory_return import MemoryReturn
from quire.server.near_misses import describe_miss
from quire.server.ollama import endpoints as ollama
from quire.server.ollama import models as ollama_models
from quire.server.responses import endpoints as responses
from quire.server.services import Services
from quire.server.settings import ServerSettings
from quire.server.traces import Traces

ENDPOINTS: tuple[Endpoint, ...] = (
    *models.ENDPOINTS,
    *adapters.ENDPOINTS,
    *completions.ENDPOINTS,
    *chat.ENDPOINTS,
    *responses.ENDPOINTS,
    *anthropic.ENDPOINTS,
    *ollama.ENDPOINTS,
    *ollama_models.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *scores.ENDPOINTS,
    *infill.ENDPOINTS,
    *tokenize.ENDPOINTS,
    *health.ENDPOINTS,
    *metrics.ENDPOINTS,
    *kv.ENDPOINTS,
)

_MAX_REQUEST_ID_CHARS = 128


def build_app(
    engine: Engine,
    settings: ServerSettings,
    keys: KeyRing,
    batches: BatchService | None = None,
    traces: Traces | None = None,
) -> ASGIApp:
    """The application that serves `engine`. It neither starts nor stops the engine, `batches` or `traces`. Raises
    `ConfigError`."""
    described = (*ENDPOINTS, *batch_endpoints(batches))
    endpoints = (*described, *openapi.endpoints(described, settings), *page_files.endpoints())
    authenticator = Authenticator(settings)
    error_forms = {endpoint.path: endpoint.errors for endpoint in endpoints}
    public = frozenset(endpoint.path for endpoint in endpoints if endpoint.public)
    middleware = [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_origin_regex=DEFAULT_ORIGINS.pattern,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["x-request-id", "x-quire-warning", "retry-after"],
        ),
        Middleware(
            _RequestMiddleware,
            engine=engine,
            settings=settings,
            authenticator=authenticator,
            hosts=HostList(settings),
            public=public,
            error_forms=error_forms,
        ),
    ]
    services = Services.open(settings, keys, traces)
    paths = [endpoint.path for endpoint in endpoints]

    def routing_error(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        shown = as_request_error(error)
        if shown.status == 404:
            shown = Refusal(404, describe_miss(path, paths), code="route_not_found")
        if shown.status == 405:
            shown = _wrong_method(
                {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
            )
        return _error_response(shown, error_forms.get(path, OPENAI_ERRORS), "")

    routes = [Route(e.path, _Bound(e, engine, settings, services), methods=[e.method]) for e in endpoints]
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: routing_error},
    )
    return _UnderRootPath(app, settings.root_path) if settings.root_path else app


class _UnderRootPath:
    """Takes the prefix of `--root-path` off the paths of requests that have it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._root_path or path.startswith(f"{self._root_path}/"):
            scope = {**scope, "path": path.removeprefix(self._root_path) or "/"}
        await self._app(scope, receive, send)


class _Bound:
    """An endpoint as the ASGI application that Starlette routes to."""

    def __init__(self, endpoint: Endpoint, engine: Engine, settings: ServerSettings, services: Services) -> None:
        self.endpoint = endpoint
        self._engine = engine
        self._settings = settings
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client, queues = scope["state"]["client"], self.endpoint.queues
        await self.endpoint.handle(
            RequestContext(self._engine, self._settings, scope, receive, send, client, self._services, queues)
        )


class _RequestMiddleware:
    """Checks every request before its endpoint; turns errors into responses and counts requests after it."""

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        settings: ServerSettings,
        authenticator: Authenticator,
        hosts: HostList,
        public: frozenset[str],
        error_forms: Mapping[str, ErrorForm],
    ) -> None:
        self._app = app
        self._engine = engine
        self._settings = settings
        self._authenticator = authenticator
        self._hosts = hosts
        self._public = public
        self._error_forms = error_forms
        self._memory = MemoryReturn()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        self._memory.request_began()
        status = 0
        request_id = (b"x-request-id", _request_id(scope))
        logs.request_id.set(request_id[1].decode())

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                now = (b"date", formatdate(usegmt=True).encode())
                message["headers"] = [*message.get("headers", ()), request_id, now]
                if warnings := scope.get("state", {}).get("warnings"):
                    message["headers"].append((b"x-quire-warning", "; ".join(warnings).encode("ascii", "replace")))
            await send(message)

        try:
            check_headers(scope, self._settings)
            scope["path"] = scope["path"].rstrip("/") or "/"  # a redirect would lose a body, or https behind a proxy
            if not self._hosts.is_own_page(scope["headers"]):
                self._authenticator.check_origin(scope["headers"])
            # Compare the raw path: a URL rebuilt from the Host header could be forged to name a public route.
            is_public = scope["path"] in self._public
            if not is_public:
                self._hosts.check(scope["headers"])
            client = Client() if is_public else self._authenticator.check_key(scope["headers"])
            scope.setdefault("state", {})["client"] = client
            await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            status = status or 499  # as nginx counts them
        except Exception as error:
            shown = as_request_error(error)
            if not status:
                form = self._error_forms.get(scope["path"], OPENAI_ERRORS)
                await _error_response(shown, form, request_id[1].decode())(scope, receive, send_with_id)
            status = status or shown.status
        finally:
            self._memory.request_ended()
            self._count(scope, status, time.monotonic() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        handler = _handler_name(scope)
        self._engine.metrics.observe_http(handler=handler, method=scope["method"], status=status, seconds=seconds)
        usage: UsageCounter | None = scope.get("state", {}).get("usage")
        logs.log_request(scope, status, seconds, None if usage is None else usage.usage())


def _wrong_method(methods: Collection[str]) -> Refusal:
    """Starlette itself names the methods of the path's first route only."""
    allowed = ", ".join(sorted(methods))
    return Refusal(
        405, f"this route takes {allowed}", code="method_not_allowed", headers=((b"allow", allowed.encode()),)
    )


def _error_response(error: RequestError, form: ErrorForm, request_id: str) -> Response:
    body = msgspec.json.encode(form.body(error, request_id))
    response = Response(body, status_code=form.status(error), media_type="application/json")
    response.raw_headers.extend(error_headers(error))
    return response


def _request_id(scope: Scope) -> bytes:
    """The client's request id, which is echoed and never used as a key; a new one if it sent none."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= _MAX_REQUEST_ID_CHARS and value.isascii():
            return bytes(value)
    return uuid.uuid4().hex.encode()


def _handler_name(scope: Scope) -> str:
    """Path of the route, not of the request: clients could otherwise add metrics without limit."""
    bound = scope.get("endpoint")
    return bound.endpoint.path if isinstance(bound, _Bound) else "none"
