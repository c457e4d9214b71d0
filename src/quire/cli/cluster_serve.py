"""`quire cluster serve`: replicas of a model on Ray Serve, behind the router."""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.options import ModelArgument, flags
from quire.cluster.options import ClusterOptions, ClusterSettings
from quire.config import EngineConfig
from quire.errors import ConfigError, EngineDeadError
from quire.server.settings import ServerSettings


@flags(ClusterSettings, EngineConfig, ServerSettings)
def cluster_serve(
    model: ModelArgument = "",
    *,
    config: Path | None = None,
    address: Annotated[str | None, Parameter(help="Address of a Ray cluster. Default: start one here.")] = None,
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
    host, port = options.pop("host", "127.0.0.1"), options.pop("port", 8000)
    given = {"model": model, **options}
    checked = ClusterOptions.of(given)
    ServerSettings(**{**checked.server, "host": host, "port": port})
    try:
        from ray import serve

        from quire.cluster.application import APP_NAME, check_ray, make_application
    except ImportError:
        raise ConfigError("clusters need Ray; install it with: pip install 'quire-llm[ray]'") from None

    def report(line: str) -> None:
        print(f"quire cluster [{time.perf_counter() - started:6.2f} s] {line}", file=sys.stderr, flush=True)

    check_ray(address)
    report("Ray is there")
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(make_application(given), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineDeadError(
            f"the replicas did not start: {reason}; `serve status` and the Ray logs say more"
        ) from None
    report(f"listening on http://{host}:{port}")
    report(f"ready: {checked.cluster.replicas} replicas")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    report("stopping: replicas finish their requests")
    serve.shutdown()
    return 0
