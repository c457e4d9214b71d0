"""`python -m benchmarks.peers DIR`: Quire, vLLM, OpenVINO GenAI, llama.cpp and transformers on the same requests.

DIR is what `python -m benchmarks.peers.prepare DIR` made. Every repeat of every engine is a fresh process in its own
interpreter, and the engines take turns (A B A B), so that the slow drift of a machine falls on all. The machine's
ceilings are measured before every round. Prints one table and writes all figures as JSON.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes.util import find_library
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import ENGINES, interpreter, model_path
from benchmarks.peers.limits import FORMATS, least_seconds
from benchmarks.peers.workloads import Workload, WorkRequest, make_workloads
from quire.model_config import ModelConfig
from quire.simulation.model_shapes import ModelShape

ROOT = Path(__file__).parents[2]
WORKLOADS = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")
TITLES = {name: workload.title for name, workload in make_workloads().items()} | {
    "W4-sampled": "as many samples instead of beams",
    "W5-first-token": "single stream, no more than that",
    "W7": "process start to first token",
}

Report = dict[str, Any]


class EngineFailed(Exception):
    """A run that ended without figures, with the last words of its process."""


def main() -> None:
    options = parse_options()
    reports: dict[str, list[Report]] = {engine: [] for engine in options.engines}
    ceilings: list[dict[str, float]] = []
    for repeat in range(options.repeats):
        ceilings.append(measure_ceilings())
        for engine in options.engines:
            print(f"run {repeat + 1} of {options.repeats}: {engine} …", file=sys.stderr, flush=True)
            try:
                reports[engine].append(run_engine(engine, options))
            except EngineFailed as failure:  # its column stays empty; the others' hours count
                print(failure, file=sys.stderr, flush=True)
    print(table(options, reports | limits(options, ceilings), ceilings))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(
            {"machine": describe_machine(), "model": options.model, "ceilings": ceilings, "runs": reports},
            indent=1,
        )
    )
    print(f"\nall figures: {options.output}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("peers", type=Path, help="folder made by python -m benchmarks.peers.prepare")
    add("--model", default="M160", help="of benchmarks.make_models (default: %(default)s)")
    add("--engines", default="quire,vllm", help=f"from {', '.join(ENGINES)} (default: %(default)s)")
    add("--only", default=",".join(WORKLOADS), help="workloads (default: %(default)s)")
    add("--repeats", type=int, default=3)
    add("--output", type=Path)
    options = parser.parse_args()
    options.engines, options.only = options.engines.split(","), options.only.split(",")
    for flag, chosen, known in (("engines", options.engines, ENGINES), ("only", options.only, WORKLOADS)):
        for name in chosen:
            if name not in known:
                parser.error(f"--{flag} has {name!r}; there are {', '.join(known)}")
    options.peers = options.peers.absolute()
    for name in options.engines:
        for needed in (
            interpreter(ENGINES[name], options.peers),
            model_path(ENGINES[name], options.peers, options.model),
        ):
            if not needed.exists():
                parser.error(f"{name} needs {needed}; python -m benchmarks.peers.prepare {options.peers} makes it")
    if options.output is None:
        options.output = ROOT / "benchmarks" / "results" / f"peers-{options.model}.json"
    return options


def run_engine(engine: str, options: argparse.Namespace) -> Report:
    """One fresh process of `engine`; what it printed is shown only if it fails."""
    row = ENGINES[engine]
    python = interpreter(row, options.peers)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if row.folder == "vllm":
        environment |= vllm_environment(python)
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        arguments = {
            "--engine": engine,
            "--peers": options.peers,
            "--model": options.model,
            "--only": ",".join(options.only),
            "--report": report,
            "--started-at": time.monotonic(),
        }
        command = [str(python), "-m", "benchmarks.peers.engine_run"]
        command += [str(word) for pair in arguments.items() for word in pair]
        with log.open("w") as out:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False)
        if done.returncode or not report.exists():
            words = log.read_text()[-4000:]
            raise EngineFailed(f"{engine} ended with status {done.returncode}; its last words:\n{words}")
        figures: Report = json.loads(report.read_text())
    return figures


def vllm_environment(python: Path) -> dict[str, str]:
    """What vLLM's CPU guide asks for: bound threads, a KV space, tcmalloc and Intel's OpenMP preloaded."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preload = [find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else None]
    return {
        "LD_PRELOAD": ":".join(filter(None, preload)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_NO_USAGE_STATS": "1",
    }


def measure_ceilings() -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ceilings"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ceilings: dict[str, float] = json.loads(done.stdout)
    return ceilings


def limits(options: argparse.Namespace, ceilings: list[dict[str, float]]) -> dict[str, list[Report]]:
    """What the workloads take at least with the ceilings of each repeat, as if engines had reported it."""
    folder = model_path(ENGINES["quire"], options.peers, options.model)
    model = ModelShape.of(ModelConfig.from_folder(folder), options.model)
    workloads = {name: workload for name, workload in make_workloads().items() if name in options.only}
    if "W5" in workloads:
        single = workloads["W5"]
        first = [WorkRequest(request.prompt_token_ids, 1) for request in single.requests]
        workloads["W5-first-token"] = Workload("", first)
    if "W4" in workloads:
        workloads["W4-sampled"] = workloads["W4"]
    return {
        f"limit {weights}": [
            {"seconds": {name: least_seconds(model, each, rates, weights) for name, each in workloads.items()}}
            for rates in ceilings
        ]
        for weights in FORMATS
    }


def table(options: argparse.Namespace, reports: dict[str, list[Report]], ceilings: list[dict[str, float]]) -> str:
    """Markdown: a row per figure, a column per engine."""
    figures = list(dict.fromkeys(name for runs in reports.values() for run in runs for name in run["seconds"]))
    figures = [name for name in figures if name != "W7" or name in options.only]
    rows = [["", *reports], ["---"] * (len(reports) + 1)]
    rows += [[f"{name} {TITLES[name]}, s", *_cells(reports, partial(_seconds, name))] for name in figures]
    if "W5" in figures:
        rows.append(["W5 decoding, tokens/s", *_cells(reports, _decode_rate)])
    rows.append(["peak memory, MiB", *_cells(reports, _peak_memory)])
    lines = [
        f"{options.model}, {options.repeats} runs each, median [least, most]",
        f"{describe_machine()}; "
        + ", ".join(f"{name} {_with_range([each[name] for each in ceilings])}" for name in ceilings[0]),
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def _cells(reports: dict[str, list[Report]], figure: Callable[[Report], float | None]) -> list[str]:
    """A cell per engine: the figure over its runs, or a dash where it has none."""
    cells = []
    for runs in reports.values():
        values = [value for run in runs if (value := figure(run)) is not None]
        cells.append(_with_range(values) if values else "–")
    return cells


def _seconds(figure: str, run: Report) -> float | None:
    seconds: float | None = run["seconds"].get(figure)
    return seconds


def _decode_rate(run: Report) -> float:
    """Tokens per second of a single stream after its first token."""
    decoded = make_workloads()["W5"].num_output_tokens - 1
    return float(decoded / (run["seconds"]["W5"] - run["seconds"]["W5-first-token"]))


def _peak_memory(run: Report) -> float | None:
    peak: int | None = run.get("peak_memory_bytes")
    return None if peak is None else peak / 2**20


def _with_range(values: list[float]) -> str:
    digits = 0 if min(values) >= 100 else 2
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} [{least}, {most}]"


def describe_machine() -> str:
    cpu = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        listed = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True).stdout
        names = [row["data"] for row in json.loads(listed)["lscpu"] if row["field"] == "Model name:"]
        cpu = names[0] if names else cpu
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}"


if __name__ == "__main__":
    main()
