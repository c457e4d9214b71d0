"""One engine in one process: loads the model, runs the chosen workloads once each, reports each figure as it comes.

Runs in the engine's own interpreter, as `python -m benchmarks.peers.engine_run`. `__main__.py` starts it and measures
the start.
"""

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.peers.engines import ENGINES, model_path
from benchmarks.peers.peer_engine import NotOffered, PeerEngine
from benchmarks.peers.results import write_whole
from benchmarks.peers.workloads import Workload, WorkRequest, make_workloads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True, choices=list(ENGINES))
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", required=True)
    parser.add_argument("--started-at", type=float, required=True, help="the parent's monotonic clock")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()

    disk_before = bytes_from_disk()
    row = ENGINES[options.engine]
    adapter = importlib.import_module(f"benchmarks.peers.{row.adapter}")
    engine: PeerEngine = adapter.open_engine(model_path(row, options.peers, options.model), **row.options)
    workloads = make_workloads()
    single = workloads["W5"].requests[0]
    engine.generate([WorkRequest(single.prompt_token_ids, 1)], n=1, temperature=0.0)
    start_seconds = time.monotonic() - options.started_at
    start_disk_bytes = bytes_from_disk() - disk_before
    seconds: dict[str, float] = {}
    stolen: dict[str, float] = {}

    def report() -> None:
        figures = {
            "version": engine.version,
            "seconds": seconds,
            "stolen_cpu_seconds": stolen,
            "start_disk_bytes": start_disk_bytes,
            "peak_memory_bytes": peak_memory(os.getpid()),
        }
        write_whole(options.report, json.dumps(figures))

    engine.generate(workloads["warm"].requests, n=1, temperature=0.0)
    for name in options.only.split(","):
        if name == "W7":  # the start of the process is already measured
            seconds[name] = start_seconds
            report()
            continue
        for figure, requests, run in what_to_time(name, workloads[name], engine):
            engine.reset(requests)
            stolen_before, start = stolen_seconds(), time.perf_counter()
            try:
                run()
            except NotOffered:
                continue
            seconds[figure] = time.perf_counter() - start
            stolen[figure] = stolen_seconds() - stolen_before
            report()
    engine.close()


def what_to_time(
    name: str, workload: Workload, engine: PeerEngine
) -> list[tuple[str, list[WorkRequest], Callable[[], None]]]:
    """Every figure of a workload: its name, its requests, and what to time."""

    def generate(requests: list[WorkRequest], n: int, temperature: float) -> None:
        check(engine.generate(requests, n=n, temperature=temperature), requests, n)

    def beam_search(beam_width: int) -> None:
        check(engine.beam_search(workload.requests, beam_width=beam_width), workload.requests, beam_width)

    plain = partial(generate, workload.requests, workload.n, workload.temperature)
    if name == "W5":
        first_token = [WorkRequest(request.prompt_token_ids, 1) for request in workload.requests]
        return [
            ("W5-first-token", first_token, partial(generate, first_token, 1, 0.0)),
            (name, workload.requests, plain),
        ]
    if workload.beam_width is not None:
        sampled = partial(generate, workload.requests, workload.beam_width, 1.0)
        return [
            (f"{name}-sampled", workload.requests, sampled),
            (name, workload.requests, partial(beam_search, workload.beam_width)),
        ]
    return [(name, workload.requests, plain)]


def check(lengths: list[int], requests: list[WorkRequest], num_samples: int) -> None:
    """Raise if output lengths differ: they are part of the workload, so an engine that stops early has not done it."""
    expected = [request.num_output_tokens for request in requests for _ in range(num_samples)]
    if lengths != expected:
        raise RuntimeError(f"samples of {lengths} tokens instead of {expected}")


def stolen_seconds() -> float:
    """Stolen CPU time since boot. Repeat a run in which it grew."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / 100


def bytes_from_disk() -> int:
    """Bytes that the machine has read from disk since boot: a start is slow if libraries left the file cache."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts["pgpgin"]) * 1024


def peak_memory(pid: int) -> int:
    """Peak resident bytes of the process and of its running children."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0) * 1024
    children = [
        child for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()
    ]
    return own + sum(peak_memory(int(child)) for child in children)


if __name__ == "__main__":
    main()
