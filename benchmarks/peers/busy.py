"""`python -m benchmarks.peers.busy DIR`: how much neighbours that keep the CPUs busy slow the engines down.

Every engine is loaded once and stays. For each number of busy neighbour processes the engines take turns to answer one
request. Printed are the slowdown against no neighbours, and in brackets that over the fair share: of C cores an engine
with C threads gets C / (C + N) beside N neighbours. Other load of the machine counts as neighbours, by the number of
runnable processes. DIR is the folder made by `python -m benchmarks.peers.prepare DIR`.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.peers.engines import ENGINES, interpreter, model_path
from benchmarks.peers.peer_engine import PeerEngine
from benchmarks.peers.workloads import WorkRequest, make_workloads

ROOT = Path(__file__).parents[2]
NEIGHBOURS = (0, 1, 2, 4, 16)
MARK = "busy: "
"""Begins the lines of a worker; an engine may print others."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.busy", description=__doc__)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--model", default="M160")
    parser.add_argument("--engines", default="quire,vllm,openvino,llama.cpp-f32", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="output tokens of a request (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.peers, options.model, options.tokens)
        return
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, options.peers.absolute(), options.model, options.tokens))
            for name in options.engines.split(",")
        }
        print(table(measure(workers, options.turns), os.cpu_count() or 1))


class Worker:
    """A process that holds one engine."""

    def __init__(self, name: str, peers: Path, model: str, num_tokens: int) -> None:
        row = ENGINES[name]
        python = interpreter(row, peers)
        words = [str(peers), "--model", model, "--tokens", str(num_tokens), "--worker", name]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if row.folder == "vllm":
            from benchmarks.peers.__main__ import vllm_environment  # it needs packages that no engine has

            environment |= vllm_environment(python)
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.busy", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ask()

    def ask(self) -> float:
        """Seconds of one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return float(json.loads(line.removeprefix(MARK)))
        raise RuntimeError(f"{self._process.args!r} has ended")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)


def work(name: str, peers: Path, model: str, num_tokens: int) -> None:
    """Load an engine, and answer one request for each line of the input."""
    row = ENGINES[name]
    adapter = importlib.import_module(f"benchmarks.peers.{row.adapter}")
    engine: PeerEngine = adapter.open_engine(model_path(row, peers, model), **row.options)
    request = WorkRequest(make_workloads()["W5"].requests[0].prompt_token_ids, num_tokens)
    for _ in sys.stdin:
        engine.reset([request])
        begin = time.perf_counter()
        engine.generate([request], n=1, temperature=0.0)
        print(f"{MARK}{time.perf_counter() - begin}", flush=True)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that compute without end."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def counting_runnable() -> Iterator[list[int]]:
    """Numbers of runnable processes, read ten times a second."""
    seen, over = list[int](), threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            seen.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


Figures = dict[str, dict[int, list[tuple[float, float]]]]
"""Engine → number of neighbours → seconds and runnable processes of each turn."""


def measure(workers: dict[str, Worker], turns: int) -> Figures:
    figures: Figures = {name: {count: [] for count in NEIGHBOURS} for name in workers}
    for _ in range(turns):
        for count in NEIGHBOURS:
            with neighbours(count):
                for name, worker in workers.items():
                    with counting_runnable() as runnable:
                        seconds = worker.ask()
                    figures[name][count].append((seconds, statistics.mean(runnable or [1])))
                    print(f"{name}, {count} neighbours: {seconds:.2f} s", file=sys.stderr, flush=True)
    return figures


def table(figures: Figures, num_cores: int) -> str:
    """Markdown: slowdown and slowdown over the fair share, medians of the turns."""
    lines = [
        "| engine | " + " | ".join(f"{count} neighbours" for count in NEIGHBOURS) + " | runnable, alone |",
        "| --- " * (len(NEIGHBOURS) + 2) + "|",
    ]
    for name, by_count in figures.items():
        cells = []
        others = statistics.median(max(0.0, runnable - num_cores) for _, runnable in by_count[0])
        for count in NEIGHBOURS:
            pairs = zip(by_count[count], by_count[0], strict=True)
            slowdown = statistics.median(seconds / alone for (seconds, _), (alone, _) in pairs)
            fair = (num_cores + others + count) / (num_cores + others)
            cells.append(f"{slowdown:.2f}× ({slowdown / fair:.2f})")
        alone = statistics.median(runnable for _, runnable in by_count[0])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {alone:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
