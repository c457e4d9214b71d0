"""`quire run`: fetch a model, serve it, and talk to it, in one command. The server ends with the conversation."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quire.cli.conversation import Conversation
from quire.cli.http_client import HttpError, Target
from quire.cli.options import ModelArgument, flags, split
from quire.cli.partners import AnswerOptions, ServerPartner
from quire.config import EngineConfig
from quire.errors import CheckpointError, ConfigError
from quire.sampling_params import SamplingParams

_USUAL_PORT = 8000
_LOOK_SECONDS = 0.1
"""Between two looks at a server that starts."""
_STOP_SECONDS = 10


@flags(AnswerOptions, EngineConfig)
def run(
    model: ModelArgument = "",
    prompt: str | None = None,
    *,
    port: int | None = None,
    system: str | None = None,
    **options: Any,
) -> int:
    """Fetch a model, serve it on this machine, and talk to it.

    While it runs, browsers and other clients find the model at the printed address.

    Parameters
    ----------
    model
        A name as for quire pull, smollm2 for a small assistant, or a folder; the bundled model if left out.
    prompt
        Answer this and end. What is piped in is added to it.
    port
        Port of the server. Default: 8000, or a free one if that is used.
    system
        The system prompt.
    """
    answer_options, engine_options = split(options, AnswerOptions, EngineConfig)
    SamplingParams(**answer_options)
    EngineConfig.from_options({"model": model, **engine_options}).make_folders()
    talks = prompt is None and sys.stdin.isatty()
    text = "" if talks else whole_prompt(prompt)
    url = f"http://127.0.0.1:{_free_port(port)}"
    command = serve_command(fetch(model, engine_options.get("revision")), url, engine_options)
    with _stopped_by_signals(), asyncio.Runner() as runner, subprocess.Popen(command, process_group=0) as server:
        try:
            if not runner.run(_ready(server, Target(f"{url}/health/ready"))):
                return server.returncode or 1
            partner = ServerPartner(f"{url}/v1", "", os.environ.get("QUIRE_API_KEY"), answer_options)
            conversation = Conversation(runner, partner, f"{model or 'the bundled model'} at {url}", system)
            if talks:
                conversation.run()
            else:
                conversation.answer_once(text)
            return 0
        finally:
            _stop(server)


def fetch(model: str, revision: str | None) -> str:
    """Download what is missing of a model. Returns the name to serve: "" for the bundled model, which stands in for a
    small assistant that cannot be had. Raises `CheckpointError`."""
    from quire.engine.checkpoint import find_model
    from quire.engine.model_sources.names import SHORT_NAMES

    try:
        find_model(model, revision)
    except CheckpointError as error:
        if model not in SHORT_NAMES or revision is not None:
            raise
        print(f"quire: {' '.join(str(error).split())}; the bundled model answers instead", file=sys.stderr)
        return ""
    return model


def serve_command(model: str, url: str, options: Mapping[str, Any]) -> list[str]:
    """The command that serves `model` at `url` with the engine's `options`."""
    port = url.rpartition(":")[2]
    command = [
        sys.executable,
        "-m",
        "quire",
        "serve",
        *([model] if model else []),
        "--host=127.0.0.1",
        f"--port={port}",
    ]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            command += [f"{flag}={item}" for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return command


def whole_prompt(prompt: str | None) -> str:
    """The prompt, and below it what is piped in. Raises `ConfigError` if there is neither."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    text = "\n".join(part for part in (prompt, piped.strip()) if part)
    if not text:
        raise ConfigError("there is no prompt; give one behind the model, or on standard input")
    return text


def _free_port(port: int | None) -> int:
    """The port to serve at. Raises `ConfigError` if the one that was asked for cannot be had."""
    from quire.server.settings import ServerSettings
    from quire.server.sockets import bind

    try:
        listener = bind(ServerSettings(port=_USUAL_PORT if port is None else port))
    except ConfigError:
        if port is not None:
            raise
        listener = bind(ServerSettings(port=0))
    with listener:
        found: int = listener.getsockname()[1]
        return found


async def _ready(server: "subprocess.Popen[bytes]", target: Target) -> bool:
    """Wait until the server is ready. False if it ends before; it has then said why."""
    while server.poll() is None:
        try:
            await target.get()
        except HttpError:
            await asyncio.sleep(_LOOK_SECONDS)
        else:
            return True
    return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the program as Ctrl-C does, so that the server ends too."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
