"""Runs a client's program against a stand-in, and reads what it shows."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quire.server.settings import ServerSettings
from tests.clients.environments import RealClient
from tests.clients.stand_in import StandIn
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import BUNDLED

PROGRAMS = Path(__file__).with_name("programs")
SECONDS = 1800
"""Most time of one program. Some clients take a minute to import on a busy machine."""
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE")

Results = dict[str, str | None]
"""What a program shows → its error, None for success."""


@contextmanager
def running_stand_in() -> Iterator[RunningServer]:
    """A server with a stand-in for the model. The defaults hold, but for the formats of calls and reasoning."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ServerSettings(
            port=0, tool_call_parser="hermes", reasoning_parser="qwen3", batch_dir=str(Path(folder) / "batches")
        )
        with RunningServer(StandIn(), settings) as server:
            yield server


@contextmanager
def running_bundled(*flags: str) -> Iterator[str]:
    """The URL of `quire serve` with the bundled model, in a process of its own."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        url = f"http://127.0.0.1:{port}"
        options = ["--port", str(port), "--threads", "1", "--batch-dir", str(Path(folder) / "batches"), *flags]
        command = [sys.executable, "-m", "quire", "serve", *options]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                _wait_for(f"{url}/health/ready")
                yield url
            finally:
                server.terminate()


def _wait_for(url: str) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            urllib.request.urlopen(url).read()
            return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.2)


@contextmanager
def running(server: str) -> Iterator[str]:
    """The URL of the server of this kind: see `RealClient.server`."""
    if server == "stand-in":
        with running_stand_in() as stand_in:
            yield stand_in.url
        return
    # Requests made of a schema ask for as many samples and tokens as they may.
    flags = ("--max-model-len", "128", "--max-num-seqs", "16") if server == "short" else ()
    with running_bundled(*flags) as url:
        yield url


def run_program(client: RealClient, url: str, folder: Path | None) -> Results:
    """Run the client's program in the environment in `folder`, by default in this one, with a home of its own."""
    program = PROGRAMS / f"{client.name.replace('-', '_')}_program{client.suffix}"
    command = [sys.executable] if folder is None else client.command(folder)
    with tempfile.TemporaryDirectory() as home:
        given = {name: os.environ[name] for name in _KEPT if name in os.environ}
        results = Path(home) / "results.jsonl"
        results.touch()
        environment = {
            **given,
            "HOME": home,
            "QUIRE_URL": url,
            "CLIENT_FOLDER": str(folder),
            "RESULTS": str(results),
            "QUIRE_TOKENIZER": str(BUNDLED),
        }
        try:
            done = subprocess.run(
                [*command, str(program)], capture_output=True, text=True, env=environment, cwd=home, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return dict.fromkeys(client.shows, f"the program has not ended within {SECONDS} s")
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    said = (done.stderr or done.stdout).strip()[-2000:]
    failure = said or f"the program shows nothing; its status is {done.returncode}"
    return {**dict.fromkeys(client.shows, failure), **{line["feature"]: line["error"] for line in lines}}
