"""Listening: uvicorn around the application, and the signals that end it: SIGTERM, Ctrl-C, a terminal that closes.

The first signal drains: /health and new requests get 503 at once, running requests have `shutdown_timeout` seconds to
finish, then the process ends. A second signal ends it without waiting, unless it is SIGHUP, which comes several times
when a terminal closes and behind SIGTERM from some supervisors. A server that was started with nohup ignores SIGHUP.
"""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from quire.engine.group_signals import GROUP_SIGNALS
from quire.server.app import ENDPOINTS, build_app
from quire.server.backend import Engine
from quire.server.batches.service import BatchService
from quire.server.batches.store import BatchStore
from quire.server.connection import limited_protocol
from quire.server.key_use import KeyRing, check_keys
from quire.server.prefix_file import read_prefixes, register_prefixes
from quire.server.settings import ServerSettings
from quire.server.sockets import remove_dead, url_of
from quire.server.tls import tls_context
from quire.server.traces import Traces

_FLUSH_SECONDS = 5
"""Time for the last bytes of responses to reach their clients once the engine has finished."""


def notify(state: str) -> None:
    """Send `state` to systemd, as sd_notify does. Does nothing unless systemd started the process and waits for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


async def serve(
    engine: Engine, settings: ServerSettings, listener: socket.socket, *, report: Callable[[str], None]
) -> bool:
    """Start the engine, serve until a signal, shut the engine down. Returns whether all requests could finish."""
    check_keys(settings, engine)
    keys = KeyRing(settings)
    batches = open_batches(engine, settings, keys)
    traces = Traces.open(settings)
    server = HttpServer(build_app(engine, settings, keys, batches, traces), settings)
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(server.stop_asked.wait())
    living = asyncio.create_task(_live(engine, server, settings, listener, report, batches))
    try:
        await asyncio.wait((listening, living, stopping), return_when=asyncio.FIRST_COMPLETED)
        for ended in (listening, living):
            if ended.done():
                ended.result()
        living.cancel()
        if batches is not None:
            await batches.stop()
        return await _drain(engine, server, settings.shutdown_timeout, report)
    finally:
        stopping.cancel()
        living.cancel()
        if batches is not None:
            await batches.stop()
        server.should_exit = True
        server.stop()
        await engine.shutdown(0)
        await listening
        if traces is not None:
            await traces.close()
        if settings.uds is not None:
            with suppress(OSError):  # another server may listen there by now
                remove_dead(Path(settings.uds))


def open_batches(engine: Engine, settings: ServerSettings, keys: KeyRing) -> BatchService | None:
    """The service for `batch_dir`; None without one. Raises `ConfigError` if the folder cannot be used."""
    if settings.batch_dir is None:
        return None
    return BatchService(BatchStore(settings.batch_dir), engine, settings, ENDPOINTS, keys)


async def _live(
    engine: Engine,
    server: "HttpServer",
    settings: ServerSettings,
    listener: socket.socket,
    report: Callable[[str], None],
    batches: BatchService | None,
) -> None:
    """Start the engine once the server answers /health, and never return. Raises the error that keeps the engine from
    starting; the server then ends too. An engine that dies later is replaced, and the server lives on.

    The address is reported after the cheap checks: a wrong model folder or prefix file is an error, not a server."""
    await server.listening.wait()
    prefixes = read_prefixes(settings)
    await engine.start()
    report(f"listening on {url_of(listener, secure=settings.ssl_certfile is not None)}")
    if prefixes:
        await register_prefixes(engine, settings, prefixes)
        report(f"prefixes: {len(prefixes)} to be computed and kept")
    await engine.wait_ready()
    gc.freeze()  # what is loaded stays; scanning it would delay requests
    report(f"ready: {', '.join(engine.model_names)}, up to {engine.max_model_len} tokens")
    notify("READY=1")
    if batches is not None:
        await batches.start()
    await asyncio.Event().wait()


async def _drain(engine: Engine, server: "HttpServer", seconds: float, report: Callable[[str], None]) -> bool:
    notify("STOPPING=1")
    report(f"stopping: running requests have {seconds:g} seconds (a second signal stops at once)")
    server.stop_asked.clear()
    drained = asyncio.create_task(engine.shutdown(seconds))
    hurried = asyncio.create_task(server.stop_asked.wait())
    await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not drained.done():
        server.force_exit = True
        drained.cancel()
        with suppress(asyncio.CancelledError):
            await drained
        return False
    drained.result()
    return True


class HttpServer(uvicorn.Server):
    """uvicorn with signals that drain first, and without its periodic tick: an idle server sleeps."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        """Raises `ConfigError` for certificate files that cannot be used."""
        tls = tls_context(settings)
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(settings),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
                ssl_context_factory=None if tls is None else lambda config, default: tls,
            )
        )
        self.listening = asyncio.Event()
        self.stop_asked = asyncio.Event()
        self._may_exit = asyncio.Event()
        self._was_asked = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self._may_exit.wait()

    def stop(self) -> None:
        """Close the socket, send what is left to send, and return from `serve`."""
        self._may_exit.set()

    def _ask_to_stop(self, number: int) -> None:
        if number != signal.SIGHUP or not self._was_asked:
            self._was_asked = True
            self.stop_asked.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
            yield
            return
        loop = asyncio.get_running_loop()
        handled = [number for number in GROUP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        for number in handled:
            loop.add_signal_handler(number, self._ask_to_stop, number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
