"""MediaFetcher: fetches images that a request names by URL, from allowed domains only.

A client that chooses a URL chooses where the server connects to. So a name must be on the list, it is resolved here,
all its addresses must be public, and the connection goes to one of the addresses that were checked: a second answer of
the DNS cannot change it. Redirects pass the same checks. Size, time and redirects have limits.
"""

import asyncio
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, urljoin, urlsplit

from quire.errors import RequestError
from quire.server.settings import ServerSettings

MAX_REDIRECTS = 3
MAX_SECONDS = 5.0
"""For one image, redirects included."""
_MAX_WAIT = 2.0
"""Seconds for which a fetch may wait for others."""
MAX_FETCHES = 8
"""Images that are fetched at once; others wait."""
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_UNICAST = ipaddress.ip_network("2000::/3")
"""The only addresses of IPv6 that hosts on the internet have."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Addresses that stand for one of IPv4."""
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "2001::/23")))
"""Ranges for protocols and documents that `is_global` does not know on every version of Python."""
_CHUNK = 64 * 1024

Resolve = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is that of a host on the internet: no private, loopback, link-local or reserved one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found not in _UNICAST:
            return False
    special = any(found in network for network in _SPECIAL if network.version == found.version)
    return found.is_global and not found.is_multicast and not special


class MediaFetcher:
    """Owned by the server."""

    def __init__(
        self,
        domains: Collection[str],
        max_bytes: int,
        *,
        resolve: Resolve = resolve,
        is_public: Callable[[str], bool] = is_public,
        seconds: float = MAX_SECONDS,
    ) -> None:
        self._domains = frozenset(domain.lower().rstrip(".") for domain in domains)
        self._max_bytes = max_bytes
        self._resolve = resolve
        self._is_public = is_public
        self._seconds = seconds
        # Threads of its own: a slow name server holds up no other work of the server.
        self._threads = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="quire-media")

    @classmethod
    def of(cls, settings: ServerSettings) -> "MediaFetcher":
        """A fetcher for the domains of the settings; no file is larger than a request may be."""
        return cls(settings.allowed_media_domains, settings.max_body_size)

    async def fetch(self, url: str) -> bytes:
        """The bytes at `url`. Raises `RequestError` for a URL that is not allowed, or that gives no file in time."""
        self._check(url)
        fetching = asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, url)
        try:
            # A name server that does not answer holds a thread for longer than the image may take: others wait for one.
            return await asyncio.wait_for(fetching, self._seconds + _MAX_WAIT)
        except TimeoutError:
            raise self._late(url) from None

    def _fetch(self, url: str) -> bytes:
        deadline = time.monotonic() + self._seconds
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._check(url)
            connection = self._connect(parts, deadline)
            # A handshake or headers that come byte by byte are late as well, and no timeout of one read ends them.
            cut = threading.Timer(_left(deadline), _shut, [connection.sock])
            cut.start()
            response: HTTPResponse | None = None
            try:
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                target = parts.path or "/"
                connection.request("GET", f"{target}?{parts.query}" if parts.query else target)
                response = connection.getresponse()
                location = response.getheader("location")
                if response.status in _REDIRECTS and location:
                    url = urljoin(url, location)
                    continue
                if response.status != 200:
                    raise _refusal(url, f"answers with status {response.status}")
                return self._read(response, connection, url, deadline)
            except (OSError, HTTPException) as error:
                late = time.monotonic() >= deadline
                raise (self._late(url) if late else _refusal(url, f"cannot be fetched: {error}")) from None
            finally:
                cut.cancel()
                if response is not None:
                    response.close()
                connection.close()
        raise _refusal(url, f"leads through more than {MAX_REDIRECTS} redirects")

    def _check(self, url: str) -> SplitResult:
        """The parts of a URL. Raises `RequestError` if it is not allowed."""
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise _refusal(url, f"is no URL: {error}") from None
        if parts.scheme not in _PORTS:
            raise _refusal(url, "is neither a data URL nor http or https")
        if not self._domains:
            raise _refusal(url, "is not fetched, since the server allows no domain; send the image as a data URL")
        if parts.username is not None or host not in self._domains:
            raise _refusal(url, f"is not of an allowed domain; allowed are {', '.join(sorted(self._domains))}")
        if not url.isprintable() or not url.isascii() or " " in url:
            raise _refusal(url, "holds characters that must be escaped")
        return parts

    def _connect(self, parts: SplitResult, deadline: float) -> HTTPConnection:
        """A connection to an address of the host that was checked."""
        host = parts.hostname or ""
        port = parts.port or _PORTS[parts.scheme]
        url = parts.geturl()
        try:
            addresses = self._resolve(host, port)
        except OSError as error:
            raise _refusal(url, f"has a host that is not found: {error}") from None
        if not addresses or not all(map(self._is_public, addresses)):
            raise _refusal(url, "has a host whose address is not public")
        try:
            plain = socket.create_connection((addresses[0], port), timeout=_left(deadline))
            connection = HTTPConnection(host, port)
            connection.sock = plain
            if parts.scheme == "https":
                connection.sock = ssl.create_default_context().wrap_socket(
                    plain, server_hostname=host, do_handshake_on_connect=False
                )
        except OSError as error:
            raise _refusal(url, f"cannot be fetched: {error}") from None
        return connection

    def _late(self, url: str) -> RequestError:
        return _refusal(url, f"does not arrive within {self._seconds:g} seconds")

    def _read(self, response: HTTPResponse, connection: HTTPConnection, url: str, deadline: float) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while True:
            if connection.sock is not None:
                connection.sock.settimeout(_left(deadline))
            piece = response.read1(_CHUNK)
            if time.monotonic() >= deadline:
                raise self._late(url)
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            if size > self._max_bytes:
                raise _refusal(url, f"has more than {self._max_bytes:,} bytes (max_body_size)")
            pieces.append(piece)


def _shut(connection: socket.socket) -> None:
    """End what another thread reads from a connection."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())


def _refusal(url: str, reason: str) -> RequestError:
    return RequestError(f"the image {url[:200]!a} {reason}", param="messages", code="invalid_image_url")
