"""`quire router`: one address in front of several servers."""

import logging
import sys
import time
from typing import Any

from quire.cli.options import flags
from quire.router.settings import RouterSettings


@flags(RouterSettings)
def router(**options: Any) -> int:
    """Send each request to the server where it costs least, and move the streams of servers that die."""
    started = time.perf_counter()
    settings = RouterSettings(**options)
    # Imported after the options are checked, so that a wrong option is answered at once.
    import uvloop

    from quire.router.serve import http_settings, serve
    from quire.server.sockets import bind

    def report(line: str) -> None:
        print(f"quire router [{time.perf_counter() - started:6.2f} s] {line}", file=sys.stderr, flush=True)

    logging.basicConfig(format="quire router %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    with bind(http_settings(settings)) as listener:
        return 0 if uvloop.run(serve(settings, listener, report=report)) else 1
