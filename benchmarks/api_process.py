"""CPU time of the API process: per streamed token, per request, and for a long prompt; Quire and vLLM in turns.

    python -m benchmarks.api_process --streams 100,1000 --peers DIR

Quire runs with a stand-in engine, which computes nothing, and with its real engine; vLLM (from DIR/vllm) with its real
engine on the same model. Only the process that speaks HTTP is measured, from /proc. Each endpoint is asked twice with
answers of two lengths: the difference is the cost of tokens, the rest that of requests.
"""

import argparse
import asyncio
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import quire
from benchmarks.peers.engines import vllm_environment
from benchmarks.socket_floor import TOKENS_PER_SECOND, print_floor
from benchmarks.stand_in_engine import PROGRAM, STEP_VARIABLE, TEXT
from benchmarks.timed_tokenizer import VARIABLE
from quire.config import EngineConfig
from quire.engine.tokenizer import load_tokenizer

BUNDLED = Path(quire.__file__).parent / "bundled"
MODEL = "m"
LENGTHS = (16, 116)
LONG_PROMPT_TOKENS = 44_000
_LONG_REQUESTS = 5
_START_SECONDS = 3600
"""Time for vLLM's engine to start. On a busy machine its ten minutes are not enough."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True},
    "/v1/completions": {"prompt": "Hello", "ignore_eos": True},
    "/v1/responses": {"input": "Hello", "store": False},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}]},
}
_STAND_IN = (
    "from benchmarks.timed_tokenizer import install; install(); "
    f"from quire.engine import engine_child; engine_child.PROGRAM = {PROGRAM!r}; import sys; "
    "from quire.cli.commands import run; sys.exit(run(sys.argv[1:]))"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    name: str
    pid: int
    port: int

    def cpu_seconds(self) -> float:
        """CPU time of the process that speaks HTTP, without its children: nanoseconds of each thread that lives."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


@dataclass(frozen=True, slots=True)
class Cost:
    """What one round of an endpoint took."""

    token: float
    """CPU seconds per token."""
    request: float
    """CPU seconds per request, its tokens apart."""
    events_per_token: float


# -- servers ----------------------------------------------------------------------------------------------------------


def allow_streams() -> None:
    """Let this process and the servers that it starts have as many sockets as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def quire_server(name: str, folder: Path, num_streams: int, *, stand_in: bool) -> Iterator[Server]:
    """`quire serve`, with a stand-in engine if asked."""
    flags = ["--port", "0", "--served-model-name", MODEL, "--max-num-seqs", str(num_streams), "--no-spare"]
    start = ["-c", _STAND_IN] if stand_in else ["-m", "quire"]
    environment = {**os.environ, STEP_VARIABLE: str(num_streams / TOKENS_PER_SECOND)}
    command = [sys.executable, *start, "serve", str(folder), "--threads", "1", "--max-queue-size", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield Server(name, process.pid, _wait_for(process, r"listening on http://127.0.0.1:(\d+)", "ready:"))
    finally:
        process.terminate()
        process.wait()


@contextmanager
def vllm_server(name: str, peers: Path, folder: Path, num_streams: int, port: int) -> Iterator[Server]:
    """vLLM's server on the same model."""
    python = peers / "vllm" / "bin" / "python"
    flags = ["--served-model-name", MODEL, "--port", str(port), "--max-num-seqs", str(num_streams)]
    flags += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *flags]
    environment = {**os.environ, **vllm_environment(python, os.sched_getaffinity(0)), "HF_HUB_OFFLINE": "1"}
    environment["VLLM_CPU_KVCACHE_SPACE"] = "2"
    environment["VLLM_ENGINE_READY_TIMEOUT_S"] = str(_START_SECONDS)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        _wait_for(process, r"(Application startup) complete", "Application startup complete")
        yield Server(name, process.pid, port)
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(process: subprocess.Popen[str], pattern: str, ready: str) -> int:
    """The number that `pattern` finds in the log (0: no number), once a line has `ready`."""
    assert process.stderr is not None
    number, last = 0, list[str]()
    for line in process.stderr:
        last = [*last[-20:], line]
        if (found := re.search(pattern, line)) and found[1].isdigit():
            number = int(found[1])
        if ready in line:
            threading.Thread(target=_discard, args=(process.stderr,), daemon=True).start()
            return number
    raise RuntimeError(f"the server has ended with status {process.wait()}: {''.join(last)}")


def _discard(stream: IO[str]) -> None:
    for _ in stream:
        pass


# -- requests ---------------------------------------------------------------------------------------------------------


async def request(port: int, path: str, body: dict[str, Any]) -> int:
    """Send one request and read its answer; returns the number of server-sent events, or 1 for a whole answer."""
    content = json.dumps({"model": MODEL, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(content), content))
        first = await reader.read(2**16)
        if b" 200 " not in first[:20]:
            raise RuntimeError(f"{path}: {first.decode()[:500]}")
        events = first.count(b"data: ")
        while data := await reader.read(2**16):
            events += data.count(b"data: ")
        return events
    finally:
        writer.close()


async def streams(server: Server, path: str, count: int, num_tokens: int) -> tuple[float, int]:
    """CPU seconds and events of `count` streams at once."""
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**BODIES[path], limit: num_tokens, "stream": True}
    before = server.cpu_seconds()
    events = await asyncio.gather(*(request(server.port, path, body) for _ in range(count)))
    return server.cpu_seconds() - before, sum(events)


def measure(server: Server, path: str, count: int) -> Cost:
    """One round of an endpoint."""
    short, long = LENGTHS
    few, few_events = asyncio.run(streams(server, path, count, short))
    many, events = asyncio.run(streams(server, path, count, long))
    token = (many - few) / (count * (long - short))
    return Cost(token, few / count - short * token, (events - few_events) / (count * (long - short)))


def measure_long_prompt(server: Server, timed: Path, text: str, repeats: int) -> tuple[float, float]:
    """Median CPU seconds that the prompt `text` adds to a request, and those of tokenising among them, which the server
    keeps in the file `timed`."""
    added, tokenising = list[float](), list[float]()
    for number in range(repeats):
        before = float(timed.read_text()) if timed.exists() else 0.0
        long, short = (_prompt_seconds(server, prompt) for prompt in (f"{number} {text}", "Hello"))
        added.append(long - short)
        tokenising.append((float(timed.read_text()) - before) / _LONG_REQUESTS)
    return statistics.median(added), statistics.median(tokenising)


def _prompt_seconds(server: Server, prompt: str) -> float:
    """CPU seconds of a request with this prompt."""
    before = server.cpu_seconds()
    for _ in range(_LONG_REQUESTS):
        asyncio.run(request(server.port, "/v1/completions", {"prompt": prompt, "max_tokens": 1}))
    return (server.cpu_seconds() - before) / _LONG_REQUESTS


# -- the table --------------------------------------------------------------------------------------------------------


@contextmanager
def long_context_model() -> Iterator[Path]:
    """The bundled model's folder with room for the long prompt; its weights are the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in BUNDLED.iterdir():
            if path.name != "config.json":
                shutil.copy(path, folder)
        config = json.loads((BUNDLED / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65_536}))
        yield folder


def print_rows(servers: list[Server], paths: list[str], count: int, repeats: int) -> None:
    """Measure all servers in turns, and print one row for each endpoint."""
    for path in paths:
        costs: dict[str, list[Cost]] = {server.name: [] for server in servers}
        for _ in range(repeats):
            for server in servers:
                try:
                    costs[server.name].append(measure(server, path, count))
                except (RuntimeError, OSError) as error:
                    print(f"{server.name}, {path}: {error}", file=sys.stderr)
        for name, rounds in costs.items():
            if rounds:
                token, per_request, events = (
                    statistics.median(getattr(cost, field) for cost in rounds)
                    for field in ("token", "request", "events_per_token")
                )
                row = f"{token * 1e6:.1f} | {per_request * 1e3:.2f} | {events:.2f}"
                print(f"| {path} | {name} | {count} | {row} |", flush=True)


def print_long_prompt(repeats: int) -> None:
    """What a prompt of `LONG_PROMPT_TOKENS` adds to a request."""
    with long_context_model() as folder:
        tokenizer = load_tokenizer(EngineConfig(model=str(folder)), folder)
        assert tokenizer is not None
        text = TEXT * (LONG_PROMPT_TOKENS // len(tokenizer.encode(TEXT, add_special_tokens=False)))
        timed = folder / "tokenising"
        os.environ[VARIABLE] = str(timed)
        with quire_server("quire, stand-in", folder, 8, stand_in=True) as server:
            added, tokenising = (seconds * 1e3 for seconds in measure_long_prompt(server, timed, text, repeats))
        print(
            f"a prompt of {LONG_PROMPT_TOKENS} tokens adds {added:.1f} ms to a request: tokenising {tokenising:.1f}, "
            f"the rest {added - tokenising:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="100,1000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--endpoints", default=",".join(BODIES))
    parser.add_argument("--peers", type=Path, help="folder of peers; without it vLLM is left out")
    parser.add_argument("--real", action="store_true", help="Quire with its real engine too")
    parser.add_argument("--no-long-prompt", action="store_true", help="leave out the prompt of 44,000 tokens")
    given = parser.parse_args()
    allow_streams()
    paths = given.endpoints.split(",")
    print("| endpoint | server | streams | µs a token | ms a request | events a token |\n|---|---|---|---|---|---|")
    for count in (int(text) for text in given.streams.split(",")):
        with ExitStack() as running:
            servers: list[Server] = []
            if given.peers:  # it takes longest to start
                peer = vllm_server("vllm", given.peers.absolute(), BUNDLED, count, 18_000 + count)
                servers.append(running.enter_context(peer))
            if given.real:
                servers.append(running.enter_context(quire_server("quire", BUNDLED, count, stand_in=False)))
            servers.append(running.enter_context(quire_server("quire, stand-in", BUNDLED, count, stand_in=True)))
            print_rows(servers[::-1], paths, count, given.repeats)
            print_floor(count, given.repeats)
    if not given.no_long_prompt:
        print_long_prompt(given.repeats)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
