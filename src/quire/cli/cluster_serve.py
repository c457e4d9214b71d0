"""`quire cluster serve`: replicas of a model on Ray Serve, behind the router."""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.options import ModelArgument, flags
from quire.cluster.head_node import check_listens, chosen_address
from quire.cluster.options import ClusterOptions, ClusterSettings
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.server.settings import ServerSettings

_ADDRESS = "Head node of a Ray cluster, as HOST:PORT or auto. Default: RAY_ADDRESS, else start a cluster here."


@flags(ClusterSettings, EngineConfig, ServerSettings)
def cluster_serve(
    model: ModelArgument = "",
    *,
    config: Path | None = None,
    address: Annotated[str | None, Parameter(help=_ADDRESS)] = None,
    **options: Any,
) -> int:
    """Serve replicas of a model on Ray, behind a router that knows their blocks.

    Parameters
    ----------
    model
        As for quire serve.
    config
        Read options from this YAML or TOML file.
    """
    started = time.perf_counter()
    host, port = options.pop("host", None), options.pop("port", None)
    given = {"model": model, **options}
    checked = ClusterOptions.of(given)
    shown = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    ServerSettings(**{**checked.server, **shown})  # a public address needs API keys
    head = chosen_address(address)
    check_listens(head)  # before Ray is loaded, which takes seconds
    try:
        from quire.cluster.start import deploy, join_ray, leave, start_serve, watch_head
    except ImportError:
        raise ConfigError("clusters need Ray; install it with: pip install 'quire-llm[ray]'") from None

    def report(line: str) -> None:
        print(f"quire cluster [{time.perf_counter() - started:6.2f} s] {line}", file=sys.stderr, flush=True)

    join_ray(head)
    report("Ray is there")
    url = start_serve(host, port)
    deploy(given)
    report(f"listening on {url}")
    report(f"ready: {checked.cluster.replicas} replicas")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    watch_head(stopped)
    report("stopping: replicas finish their requests")
    leave(head)
    return 0
