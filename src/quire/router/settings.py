"""RouterSettings: the options of `quire router`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from quire.errors import ConfigError
from quire.option_values import parse_size
from quire.routing.policies import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Options of one router. Raises `ConfigError` for a value out of range."""

    backends: tuple[str, ...] = ()
    """URLs of the servers, separated by commas: Quire's, or others with OpenAI's API. All serve one model."""
    decode: tuple[str, ...] = ()
    """The same as `backends`, beside `prefill`."""
    prefill: tuple[str, ...] = ()
    """URLs of Quire servers that compute long prompts first; those of `decode` fetch the blocks from them
    (--kv-transfer-config)."""
    prefill_min_tokens: int = 512
    """Shorter prompts, counted without what the answering server holds, are computed where they are answered."""
    prefill_timeout: float = 60.0
    """Seconds after which a prompt is computed where it is answered."""
    backends_file: Path | None = None
    """File with a URL of a server on each line, read again when it changes: a server can come and go while the router
    runs. One that goes finishes its requests."""
    kv_events: tuple[str, ...] = ()
    """ZMQ addresses of the servers' KV events, in the order of `backends`, separated by commas; a - for a server
    without. Default: the router guesses what the servers hold (needs the events extra)."""
    backend_api_key: str | None = None
    """API key for the router's own questions to the servers. Clients send theirs, and it is passed on."""
    backend_ca_file: Path | None = None
    """File with the certificates (PEM) that sign those of servers at https://. Default: the system's."""
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
    server_timeout: float = 30.0
    """Seconds that a request waits for a server if none takes requests. A stream that has begun waits four times as
    long."""
    health_interval: float = 1.0
    """Seconds between two looks at a server's health."""
    max_deaths: int = 3
    """Servers that may die while they compute a request. After that it is refused for ten minutes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_body_size", parse_size("max_body_size", self.max_body_size))
        for name in ("backends", "decode", "prefill", "kv_events"):
            given = getattr(self, name)
            parts = [given] if isinstance(given, str) else given
            urls = [url.strip().rstrip("/") for part in parts for url in part.split(",")]
            object.__setattr__(self, name, tuple(url for url in urls if url))
        if self.decode and self.backends:
            raise ConfigError("decode and backends are both given, and mean the same; give one of them")
        object.__setattr__(self, "backends", self.backends or self.decode)
        if not self.backends and self.backends_file is None:
            raise ConfigError(
                "backends is empty: give the URLs of the servers, as --backends http://a:8000,http://b:8000"
            )
        if self.backends and self.backends_file is not None:
            raise ConfigError("backends and backends_file are both given; write all servers into the file, or none")
        check_urls("backends", self.backends)
        check_urls("prefill", self.prefill)
        if both := set(self.backends) & set(self.prefill):
            raise ConfigError(f"prefill has {min(both)}, which is also among those that answer; leave it out of one")
        if self.kv_events and len(self.kv_events) != len(self.backends):
            raise ConfigError(
                f"kv_events has {len(self.kv_events)} addresses for {len(self.backends)} backends; give one for each, "
                "and a - for a server without events"
            )
        for address in self.kv_events:
            if address != "-" and not _is_event_address(address):
                raise ConfigError(f"kv_events has {address!r}; write it as tcp://host:5557 or ipc://path")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}")
        for name, low, high in (
            ("port", 0, 65535),
            ("server_timeout", 0, 86_400),
            ("max_backend_requests", 1, 2**16),
            ("max_queue_size", 0, 2**20),
            ("max_blocks", 1, 2**26),
            ("max_deaths", 1, 100),
            ("prefill_min_tokens", 1, 2**24),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")
        if not 0.05 <= self.health_interval <= 3600:
            raise ConfigError(f"health_interval is {self.health_interval}; it must be from 0.05 to 3600 seconds")
        if not 0 < self.prefill_timeout <= 3600:
            raise ConfigError(f"prefill_timeout is {self.prefill_timeout}; it must be above 0, at most 3600 seconds")
        if not self.shutdown_timeout >= 0:
            raise ConfigError(f"shutdown_timeout is {self.shutdown_timeout}; it must be 0 or more seconds")


_LONGEST_IPC = 108
"""Bytes of a Unix socket's path are fewer."""


def _is_event_address(address: str) -> bool:
    if address.startswith("ipc://"):
        return len("ipc://") < len(address) < _LONGEST_IPC
    try:
        parsed = urlsplit(address)
        return parsed.scheme == "tcp" and bool(parsed.hostname) and bool(parsed.port) and not parsed.path
    except ValueError:  # a port out of range, or half an IPv6 address
        return False


def check_urls(name: str, urls: Sequence[str]) -> None:
    """Raise `ConfigError` for what is no URL of a server, or is there twice. `name` is the option's."""
    for url in urls:
        try:
            parsed = urlsplit(url)
            is_url = parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
        except ValueError:  # a port out of range, or half an IPv6 address
            is_url = False
        if not is_url or parsed.query or parsed.fragment or not url.isprintable() or " " in url:
            raise ConfigError(f"{name} has {url!r}, which is no URL of a server; write it as http://host:8000")
        if parsed.path.endswith("/v1"):
            raise ConfigError(f"{name} has {url!r}; leave out /v1 at its end: the router adds it")
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise ConfigError(f"{name} has {twice} twice; name each server once")
