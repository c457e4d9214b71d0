"""HostList: the names under which clients may call the server, against DNS rebinding.

A web page of evil.example whose name comes to resolve to this machine is, for its browser, a page of this server. The
browser still sends `Host: evil.example`. An address in figures needs no DNS, so it is always allowed.
"""

import ipaddress
import re

from quire.errors import ConfigError
from quire.server.errors import Refusal
from quire.server.settings import ServerSettings, is_loopback

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:]*)(?::\d*)?")
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")


class HostList:
    """Checks the Host header. A server with API keys checks only if `allowed_hosts` is set: no page knows a key."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises `ConfigError` for an allowed host that is no host."""
        given = [_checked(host) for host in settings.allowed_hosts]
        self._allowed = frozenset([*given, _name(settings.host)])
        self._checks = "*" not in given and bool(given or not settings.keys)

    def check(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Raise `Refusal` (403) for a Host that is not allowed. Browsers never leave it out or empty."""
        if not self._checks:
            return
        for name, value in headers:
            if name == b"host" and not self._allows(host := _name(value.decode("latin-1"))):
                raise Refusal(
                    403,
                    f"this server is not called {host[:200]!r}; --allowed-hosts names the hosts that it answers for",
                    code="host_not_allowed",
                )

    def is_own_page(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether a page of this server sends the request: its origin is the Host, which is one of the server's names.

        `allowed_hosts` of * names none: a page of any name that resolves to this machine would count as its own.
        """
        found = dict(headers)
        host, origin = found.get(b"host", b"").decode("latin-1"), found.get(b"origin", b"").decode("latin-1")
        return bool(host) and origin.partition("://")[2] == host and self._allows(_name(host))

    def _allows(self, host: str) -> bool:
        if not host or host in self._allowed or host.endswith(".localhost") or is_loopback(host):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


def _name(host: str) -> str:
    """The name or address in a Host header, without port, brackets and the root's dot."""
    match = _HOST.fullmatch(host.strip().lower())
    return (match[1] if match else host).strip("[]").removesuffix(".")


def _checked(host: str) -> str:
    name = _name(host)
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if name != "*" and not _NAME.fullmatch(name):
            raise ConfigError(
                f"allowed_hosts holds {host!r}; give a name such as llm.example.com, an address, or * for all"
            ) from None
    return name
