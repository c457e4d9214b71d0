"""The head node of a Ray cluster: how its address is written, and whether anything listens there.

Ray itself tries for minutes to reach an address at which nothing listens.
"""

import os
import socket
from collections.abc import Mapping

from quire.errors import ConfigError

AUTO, LOCAL = "auto", "local"
"""Ray's words: a cluster that runs on this machine, and a new one here."""
_CONNECT_SECONDS = 5.0
_CLIENT = "ray://"


def chosen_address(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The address that was given, else RAY_ADDRESS as everywhere in Ray, else `LOCAL`. Raises `ConfigError` for one
    that is written in another way."""
    address, source = given or LOCAL, "address"
    if given in (None, AUTO) and (other := environment.get("RAY_ADDRESS")):
        address, source = other, "RAY_ADDRESS"
    if address in (AUTO, LOCAL):
        return address
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536) or "/" in host:
        hint = ""
        if address.startswith(_CLIENT):
            hint = "; ray:// is for clients, and Serve's replicas need the cluster itself, by default at port 6379"
        raise ConfigError(
            f"{source} is {address!r}; it must be HOST:PORT of the head node, such as 10.0.0.1:6379, {AUTO} for a "
            f"cluster that runs on this machine, or {LOCAL} to start one here{hint}"
        )
    return address


def check_listens(address: str) -> None:
    """Raise `ConfigError` if nothing listens at HOST:PORT; the other addresses are for Ray to find."""
    if address in (AUTO, LOCAL):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise no_cluster(address, (error.strerror or str(error)).lower()) from None


def no_cluster(address: str, reason: str) -> ConfigError:
    """The error for an address at which no Ray cluster answers."""
    return ConfigError(
        f"no Ray cluster answers at {address}: {reason}. Start its head node with `ray start --head`, or leave out "
        "--address to start one here"
    )
