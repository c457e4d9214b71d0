"""`python -m benchmarks.peers.busy DIR`: how much neighbours that keep the CPUs busy slow the engines down.

Every engine is loaded once and stays. For each number of busy neighbour processes the engines take turns to answer one
request. Printed are the slowdown against no neighbours, and in brackets that over the fair share: of C cores an engine
with C threads gets C / (C + N) beside N neighbours. Other load of the machine counts as neighbours, by the number of
runnable processes. DIR is the folder made by `python -m benchmarks.peers.prepare DIR`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.peers.engines import ENGINES, model_path
from benchmarks.peers.worker import Worker
from benchmarks.peers.workloads import WorkRequest, make_workloads

NEIGHBOURS = (0, 1, 2, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.busy", description=__doc__)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--model", default="M160")
    parser.add_argument("--engines", default="quire,vllm,openvino,llama.cpp-f32", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="output tokens of a request (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    peers = options.peers.absolute()
    request = WorkRequest(make_workloads()["W5"].requests[0].prompt_token_ids, options.tokens)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {
            name: stack.enter_context(
                Worker(ENGINES[name], model_path(ENGINES[name], peers, options.model), peers, logs / name)
            )
            for name in options.engines.split(",")
        }
        for worker in workers.values():
            worker.run([request])
        print(table(measure(workers, request, options.turns), os.cpu_count() or 1))


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


def measure(workers: dict[str, Worker], request: WorkRequest, turns: int) -> Figures:
    figures: Figures = {name: {count: [] for count in NEIGHBOURS} for name in workers}
    for _ in range(turns):
        for count in NEIGHBOURS:
            with neighbours(count):
                for name, worker in workers.items():
                    with counting_runnable() as runnable:
                        seconds = worker.run([request]).seconds
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
