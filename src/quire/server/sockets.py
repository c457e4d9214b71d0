"""The socket that the server listens on: a port, a Unix socket, or one that systemd hands over (socket activation)."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quire.errors import ConfigError
from quire.server.settings import ServerSettings

_FIRST_INHERITED = 3
"""Descriptor of the first socket that systemd hands over, after standard input, output and error."""


def bind(settings: ServerSettings) -> socket.socket:
    """A listening socket: systemd's if it hands one over. Raises `ConfigError`, with the way out, for an address that
    cannot be bound."""
    inherited = _inherited(settings)
    if inherited is not None:
        return inherited
    if settings.uds is not None:
        return _bind_unix(Path(settings.uds))
    host, port = settings.host.strip("[]"), settings.port
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror:
        raise ConfigError(f"host {host!r} is not an address; check --host") from None
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except PermissionError:
        raise ConfigError(f"port {port} needs privileges; choose one above 1023 with --port") from None
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; stop what uses it, or choose another --port (0: a free one)"
        ) from None


def url_of(listener: socket.socket, *, secure: bool = False) -> str:
    """URL at which clients on this machine reach the server; of a Unix socket, unix: and its path."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return f"{'https' if secure else 'http'}://{host}:{port}"


def _inherited(settings: ServerSettings) -> socket.socket | None:
    """The socket that systemd hands over, as sd_listen_fds finds it; None without one.

    Raises `ConfigError` for several sockets, for one that does not listen, and for one that others can reach if there
    is no API key.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = int(os.environ.get("LISTEN_FDS", "0"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # they are not for the engine's process
        os.environ.pop(name, None)
    if count == 0:
        return None
    if count > 1:
        raise ConfigError(f"systemd hands over {count} sockets; name one ListenStream in the socket unit")
    os.set_inheritable(_FIRST_INHERITED, False)
    listener = socket.socket(fileno=_FIRST_INHERITED)
    is_stream = listener.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if not (is_stream and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        raise ConfigError("systemd hands over a socket that does not listen; set ListenStream and Accept=no")
    if listener.family != socket.AF_UNIX:
        settings.check_exposure(listener.getsockname()[0])
    return listener


def _bind_unix(path: Path) -> socket.socket:
    """A socket at `path`, for its owner and group. A socket that a dead server left there is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o117)
    try:
        with _alone_in(path.parent):
            remove_dead(path)
            listener.bind(str(path))
            listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise ConfigError(f"cannot listen on {path}: {reason}; choose another --uds") from None
    finally:
        os.umask(mask)
    return listener


def remove_dead(path: Path) -> None:
    """Remove a socket that nobody listens on; leave all else. Raises `OSError` if it cannot be removed."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a server with many waiting clients would keep it
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other servers from the sockets of a folder, so that none removes one that has just begun to listen."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # it may hold sockets and not be readable; if it is missing, the socket's own error says so
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
