"""`python -m benchmarks.peers.serving DIR`: servers under load, with W1's requests as a Poisson process.

The servers take turns; each is started once per round and answers all rates. Prompts, lengths and arrivals are the
same for every server. Prompts differ between rates, so that there are no prefix hits. Times to first token and between
tokens are milliseconds. DIR is the folder made by `python -m benchmarks.peers.prepare DIR`.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.__main__ import ROOT, describe_machine, measure_ceilings
from benchmarks.peers.engines import ENGINES, environment, interpreter, model_path
from benchmarks.peers.peer_engine import MAX_MODEL_LEN, MAX_NUM_SEQS
from benchmarks.peers.workloads import TOKEN_IDS, make_workloads
from quire.cli.bench_serve import load_figures, run_load
from quire.cli.bench_workload import Workload
from quire.cli.http_client import Target

SERVERS = ("quire", "quire-bf16", "quire-int8", "vllm", "vllm-eager", "vllm-bf16")
MODEL_NAME = "m"
START_SECONDS = 300.0
FIGURES = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "output_throughput")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.serving", description=__doc__)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--model", default="M160")
    parser.add_argument("--servers", default="quire,vllm", help=f"from {', '.join(SERVERS)} (default: %(default)s)")
    parser.add_argument("--rates", default="1,2,4", help="requests per second (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    servers = options.servers.split(",")
    for name in servers:
        if name not in SERVERS:
            parser.error(f"--servers has {name!r}; there are {', '.join(SERVERS)}")
    rates = [float(rate) for rate in options.rates.split(",")]
    runs: dict[str, dict[float, list[dict[str, Any]]]] = {name: {rate: [] for rate in rates} for name in servers}
    ceilings = []
    for repeat in range(options.repeats):
        ceilings.append(measure_ceilings())
        for name in servers:
            print(f"run {repeat + 1} of {options.repeats}: {name} …", file=sys.stderr, flush=True)
            with running_server(name, options.peers.absolute(), options.model) as url:
                asyncio.run(run_load(Target(f"{url}/v1/completions", None), shifted(8, 1), MODEL_NAME, 8.0, None, 0))
                for rate in rates:
                    runs[name][rate].append(measure(url, rate, options.num_prompts))
    print(f"{options.model}, {describe_machine()}, {options.num_prompts} requests at each rate; ceilings {ceilings}\n")
    print(table(runs))
    output = ROOT / "benchmarks" / "results" / f"serving-{options.model}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": describe_machine(), "ceilings": ceilings, "runs": runs}, indent=1))


def measure(url: str, rate: float, num_prompts: int) -> dict[str, Any]:
    started = time.perf_counter()
    work = shifted(num_prompts, round(rate * 1009))
    target = Target(f"{url}/v1/completions", None)
    outcomes = asyncio.run(run_load(target, work, MODEL_NAME, rate, None, seed=7))
    return load_figures(outcomes, time.perf_counter() - started, (99.0,))


def shifted(num_prompts: int, shift: int) -> Workload:
    """W1's first requests with every token id increased by `shift`."""
    requests = make_workloads()["W1"].requests[:num_prompts]
    start, count = TOKEN_IDS.start, len(TOKEN_IDS)
    return Workload(
        [[start + (token - start + shift) % count for token in request.prompt_token_ids] for request in requests],
        [request.num_output_tokens for request in requests],
    )


@contextmanager
def running_server(name: str, peers: Path, model: str) -> Iterator[str]:
    """A server of that engine on a free port. It ends with the block."""
    row = ENGINES[name]
    python = interpreter(row, peers)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(model_path(row, peers, model))
    options = {key: value for key, value in row.options.items() if key != "library"}
    flags = ["--served-model-name", MODEL_NAME, "--port", str(port)]
    flags += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        flags += [flag] * value if isinstance(value, bool) else [flag, str(value)]
    if row.folder == "vllm":
        # `vllm serve` imports packages that its CPU build lacks.
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", path, *flags]
    else:
        command = [str(python), "-m", "quire", "serve", path, *flags]
    url = f"http://127.0.0.1:{port}"
    settings = environment(row, peers, os.sched_getaffinity(0))
    server = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server generates a token: it may be healthy while its model loads."""
    body = json.dumps({"model": MODEL_NAME, "prompt": [5, 6, 7], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=START_SECONDS):
                return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no token from {' '.join(map(str, server.args))}") from error  # type: ignore[arg-type]
            time.sleep(0.2)


def table(runs: dict[str, dict[float, list[dict[str, Any]]]]) -> str:
    """Markdown: a row per rate and server, medians over the repeats."""
    rows = [["requests/s", "server", *FIGURES], ["---"] * (len(FIGURES) + 2)]
    rates = next(iter(runs.values())).keys()
    for rate in rates:
        for name, results in runs.items():
            values = [statistics.median(result[figure] for result in results[rate]) for figure in FIGURES]
            rows.append([f"{rate:g}", name, *(f"{value:.0f}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
