"""RouterSettings: the options of `quire router`."""

from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from quire.errors import ConfigError
from quire.option_values import parse_size
from quire.routing.policies import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Options of one router. Raises `ConfigError` for a value out of range."""

    backends: tuple[str, ...] = ()
    """URLs of the servers, separated by commas: Quire's, or others with OpenAI's API. All serve one model."""
    kv_events: tuple[str, ...] = ()
    """ZMQ addresses of the servers' KV events, in the order of `backends`, separated by commas; a - for a server
    without. Default: the router guesses what the servers hold (needs the events extra)."""
    backend_api_key: str | None = None
    """API key for the router's own questions to the servers. Clients send theirs, and it is passed on."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8080
    """Port to listen on. 0 takes a free port."""
    allow_unauthenticated: bool = False
    """Listen on a public address although the servers ask for no API key."""
    max_body_size: int = 8 * 2**20
    """Maximum bytes of a request body, e.g. 8MiB. A larger body is answered with 413."""
    shutdown_timeout: float = 30.0
    """Seconds for running requests to finish after SIGTERM. A second signal stops at once."""
    policy: str = "least-work"
    """How a server is chosen: least-work, round-robin, least-load, sticky or longest-prefix."""
    max_backend_requests: int = 256
    """Requests that one server is sent at once. More wait in the router."""
    max_queue_size: int = 1024
    """Requests that wait in the router. More are answered with 429."""
    max_blocks: int = 2**17
    """Blocks of one server that the router remembers."""
    health_interval: float = 1.0
    """Seconds between two looks at a server's health."""
    max_deaths: int = 3
    """Servers that may die while they compute a request. After that it is refused for ten minutes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_body_size", parse_size("max_body_size", self.max_body_size))
        for name in ("backends", "kv_events"):
            given = getattr(self, name)
            parts = [given] if isinstance(given, str) else given
            urls = [url.strip().rstrip("/") for part in parts for url in part.split(",")]
            object.__setattr__(self, name, tuple(url for url in urls if url))
        if not self.backends:
            raise ConfigError(
                "backends is empty: give the URLs of the servers, as --backends http://a:8000,http://b:8000"
            )
        for url in self.backends:
            parsed = _parse(url)
            if parsed is None or not parsed.hostname or parsed.query or parsed.fragment:
                raise ConfigError(f"backends has {url!r}, which is no URL of a server; write it as http://host:8000")
            if parsed.path.rstrip("/"):
                raise ConfigError(f"backends has {url!r}; leave out the path {parsed.path!r}: the router adds paths")
        if len(set(self.backends)) < len(self.backends):
            twice = next(url for url in self.backends if self.backends.count(url) > 1)
            raise ConfigError(f"backends has {twice} twice; name each server once")
        if self.kv_events and len(self.kv_events) != len(self.backends):
            raise ConfigError(
                f"kv_events has {len(self.kv_events)} addresses for {len(self.backends)} backends; give one for each, "
                "and a - for a server without events"
            )
        for address in self.kv_events:
            if address != "-" and not address.startswith(("tcp://", "ipc://")):
                raise ConfigError(f"kv_events has {address!r}; write it as tcp://host:5557 or ipc://path")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}")
        for name, low, high in (
            ("port", 0, 65535),
            ("max_backend_requests", 1, 2**16),
            ("max_queue_size", 0, 2**20),
            ("max_blocks", 1, 2**26),
            ("max_deaths", 1, 100),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")
        if not 0.05 <= self.health_interval <= 3600:
            raise ConfigError(f"health_interval is {self.health_interval}; it must be from 0.05 to 3600 seconds")
        if not self.shutdown_timeout >= 0:
            raise ConfigError(f"shutdown_timeout is {self.shutdown_timeout}; it must be 0 or more seconds")


def _parse(url: str) -> SplitResult | None:
    """The parts of a server's URL; None for a text that is none, such as one with a port that is no number."""
    try:
        parsed = urlsplit(url)
        return parsed if parsed.scheme in ("http", "https") and parsed.port != 0 else None
    except ValueError:
        return None
