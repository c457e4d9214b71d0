"""Ray and Ray Serve for `quire cluster serve`: joined or started, and their failures in plain words."""

import logging
import os
import re
import socket
import threading
from collections.abc import Mapping
from typing import Any

import grpc
import ray
from ray import serve
from ray._private.services import get_ray_address_from_environment as ray_address
from ray.serve.context import _get_global_client as serve_client

from quire.cluster.application import APP_NAME, make_application
from quire.cluster.head_node import AUTO, LOCAL, check_listens, no_cluster
from quire.errors import ConfigError, EngineDeadError
from quire.server.settings import ServerSettings
from quire.server.sockets import bind

_ENVIRONMENT = {
    # Ray's default of 15 lets any other process of the machine starve the server.
    "RAY_worker_niceness": "0",
    # Ray's default of 5 s is too short on a busy machine: it kills its HTTP proxy while that still imports.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""For a Ray that starts here. What the user's environment says goes first."""


_STARTS = 5
"""Ray gives its own agents 15 seconds to start, which a busy machine exceeds. The next time they start faster."""
_GRPC_SECONDS = 20.0
"""Time in which a head node answers, also on a busy machine."""
_LOOK_SECONDS, _MISSED_LOOKS = 2.0, 5
"""Seconds between looks at the head node, and looks without an answer after which it is dead."""


def join_ray(address: str) -> None:
    """Join the Ray cluster at `address`, or start one here. Raises `ConfigError` if that cannot be done."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "ignore_reinit_error": True}
    if address != LOCAL:
        found = address
        try:
            if address == AUTO:
                found = ray_address(AUTO, None)
            check_listens(found)  # it may be that of a cluster that died
            _check_speaks_grpc(found)
            ray.init(address=address, **quiet)  # with `AUTO` Ray reads the cluster's token
        except ConfigError:
            raise
        except Exception as error:  # Ray raises plain exceptions too
            raise no_cluster(found, _reason(error)) from None
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for attempt in range(_STARTS):
        try:
            # Ray's dashboard is a process of its own, which only Ray's other tools need.
            ray.init(address=LOCAL, include_dashboard=False, **quiet)
            return
        except Exception as error:
            ray.shutdown()
            if attempt == _STARTS - 1:
                raise ConfigError(f"Ray cannot be started here: {_reason(error)}") from None


def _check_speaks_grpc(address: str) -> None:
    """Raise `ConfigError` if what listens at an address is no head node: Ray would try for minutes."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # Ray knows the certificates
    channel = grpc.insecure_channel(address)
    try:
        grpc.channel_ready_future(channel).result(_GRPC_SECONDS)
    except grpc.FutureTimeoutError:
        raise no_cluster(address, "what listens there is no Ray head node, whose port is 6379 by default") from None
    finally:
        channel.close()


def start_serve(host: str | None, port: int | None) -> str:
    """Start Serve's HTTP proxies, and return the URL at which they listen. None: what runs already, else
    127.0.0.1:8000. Raises `ConfigError` for an address that is taken, or that a running Serve does not have."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = _running_address()
    if running is not None:
        for name, wanted, has in (("host", host, running[0]), ("port", port, running[1])):
            if wanted is not None and wanted != has:
                raise ConfigError(
                    f"{name} is {wanted}, but Serve runs on this Ray cluster already, with {name} {has}, and has one "
                    f"address for all applications; leave out --{name}, or stop Serve first: serve shutdown"
                )
        return _url(*running)
    settings = ServerSettings(host=host or "127.0.0.1", port=8000 if port is None else port, allow_unauthenticated=True)
    with bind(settings) as free:  # Ray's proxy would fail again and again where the port is taken
        settings_port = int(free.getsockname()[1])
    try:
        serve.start(http_options={"host": settings.host, "port": settings_port})
    except Exception as error:  # actors that die, timeouts, and Ray's own
        raise EngineDeadError(
            f"Ray Serve could not start its HTTP proxy on {settings.host}:{settings_port}: {_reason(error)}; the logs "
            "in /tmp/ray/session_latest/logs/serve say more"
        ) from None
    return _url(settings.host, settings_port)


def deploy(options: Mapping[str, Any]) -> None:
    """Run the application, and wait until all replicas are ready. Raises `EngineDeadError` if they do not start."""
    try:
        serve.run(make_application(options), name=APP_NAME, route_prefix="/")
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise EngineDeadError(
            f"the replicas did not start: {_reason(f'{error} {_messages()}')}; `serve status` and the Ray logs say more"
        ) from None


def watch_head(stopped: threading.Event) -> None:
    """Wait until `stopped` is set. Raises `EngineDeadError` if the head node dies before: Ray would end this process
    without a word."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    num_missed = 0
    while not stopped.wait(_LOOK_SECONDS):
        try:
            socket.create_connection((host, int(port)), _LOOK_SECONDS).close()
            num_missed = 0
        except OSError:
            num_missed += 1
            if num_missed == _MISSED_LOOKS:
                raise EngineDeadError(
                    f"the Ray head node at {host}:{port} does not answer any more. Replicas on other nodes still "
                    "answer, but nothing replaces them; start the head node again, and run this command again"
                ) from None


def leave(address: str) -> None:
    """Drain the replicas and end them. A Ray cluster that was joined keeps its other applications."""
    if address == LOCAL:
        serve.shutdown()
    else:
        serve.delete(APP_NAME)


def _running_address() -> tuple[str, int] | None:
    """Where a Serve listens that runs on this cluster already; None if none does."""
    try:
        config = serve_client().http_config
    except ray.serve.exceptions.RayServeException:
        return None
    return config.host, config.port


def _messages() -> str:
    """What Serve says of the application's deployments: the stack traces of replicas that failed."""
    try:
        application = serve.status().applications.get(APP_NAME)
    except (RuntimeError, ray.exceptions.RayError):  # the head node is dead
        return ""
    return " ".join(each.message for each in application.deployments.values()) if application else ""


def _url(host: str, port: int) -> str:
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _reason(error: Exception | str) -> str:
    """One line of a few hundred characters: Ray's messages hold whole stack traces, with our error at their end."""
    if own := re.findall(r"quire\.errors\.\w+: (.+)", str(error)):
        return str(own[-1])[:600]
    return " ".join(str(error).split())[:300] or type(error).__name__
