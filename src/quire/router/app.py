"""The router's ASGI application: its own state at /router and /health, everything else to a server."""

import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from quire.errors import EngineUnavailableError
from quire.router.backends import Backends
from quire.router.proxy import Proxy
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet
from quire.server.errors import Refusal, as_request_error, error_body, error_headers
from quire.server.hosts import HostList
from quire.server.limits import ClientGoneError, check_headers
from quire.server.settings import ServerSettings

HEALTH = ("/health", "/health/ready")
LIVE = "/health/live"
STATE = "/router"


class ReplicaState(Struct):
    """One server."""

    url: str
    is_up: bool
    reason: str
    """Why it takes no requests."""
    models: list[str]
    block_size: int
    """0 for a server that is not Quire."""
    version: str
    num_requests: int = 0
    queued_tokens: int = 0
    context_tokens: int = 0
    total_tokens: int = 0
    known_blocks: int = 0


class RouterState(Struct):
    """The answer at /router."""

    replicas: list[ReplicaState]
    waiting: int
    requests: int
    moved: int
    resumed_streams: int
    mixed_streams: int
    cut_streams: int
    prefill: list[ReplicaState]
    """The servers that compute prompts for the others."""
    prefilled: int
    """Prompts that they computed."""


class RouterApp:
    """An ASGI application. It neither starts nor stops the looks at the servers."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, backends: Backends) -> None:
        self.proxy = Proxy(settings, fleet, backends)
        self.is_draining = False
        """The router is going away: it takes no new requests."""
        self.num_running = 0
        self._fleet = fleet
        self._backends = backends
        self._limits = ServerSettings(host=settings.host, port=settings.port, allow_unauthenticated=True)
        self._hosts = HostList(self._limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.num_running += 1
        try:
            check_headers(scope, self._limits)
            await self._route(scope, receive, send)
        except ClientGoneError:
            pass
        except Exception as error:
            shown = as_request_error(error)
            await _reply(send, error_body(shown), shown.status, error_headers(shown))
        finally:
            self.num_running -= 1

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == LIVE:
            await _reply(send, {"status": "live"})
        elif path in HEALTH:
            num_up = 0 if self.is_draining else len(self._fleet.replicas)
            status = "ready" if num_up else "no server takes requests"
            await _reply(send, {"status": status, "servers": num_up}, 200 if num_up else 503)
        else:
            if self.is_draining:
                raise EngineUnavailableError("the router is shutting down and takes no new requests")
            if self._backends.is_open:
                self._hosts.check(scope["headers"])
            if not path.startswith("/"):
                raise Refusal(400, f"the path is {path[:80]!r}; it begins with /", code="invalid_value")
            if path == STATE:
                await _reply(send, self.state())
            else:
                await self.proxy.handle(scope, receive, send)

    def state(self) -> RouterState:
        """The router's view of the servers, and its counts."""
        counts = self.proxy.counts
        prefill = self.proxy.prefill
        replicas = _replica_states(self._backends, self._fleet)
        return RouterState(
            replicas,
            len(self.proxy.waiting),
            counts.requests,
            counts.moved,
            counts.resumed_streams,
            counts.mixed_streams,
            counts.cut_streams,
            [] if prefill is None else _replica_states(prefill.backends, prefill.fleet),
            0 if prefill is None else prefill.num_prompts,
        )


def _replica_states(backends: Backends, fleet: Fleet) -> list[ReplicaState]:
    states = []
    for url, backend in backends.by_url.items():
        replica = fleet.replicas.get(url)
        state = ReplicaState(
            url, backend.is_up, backend.reason, list(backend.models), backend.block_size, backend.version
        )
        if replica is not None:
            load = replica.load
            state.num_requests, state.queued_tokens = load.num_requests, load.queued_tokens
            state.context_tokens, state.total_tokens = load.context_tokens, load.total_tokens
            state.known_blocks = fleet.index.num_blocks(replica.number)
        states.append(state)
    return states


async def _reply(send: Send, body: object, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    content = msgspec.json.encode(body)
    length = (b"content-length", str(len(content)).encode())
    head = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": content})
