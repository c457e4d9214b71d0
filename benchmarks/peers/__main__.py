"""`python -m benchmarks.peers DIR`: Quire, vLLM, OpenVINO GenAI, llama.cpp and transformers on the same requests.

DIR is the folder made by `python -m benchmarks.peers.prepare DIR`. Every repeat of every engine is a fresh process in
its own interpreter. The engines take turns (A B A B), so that slow drift of the machine affects all. The machine's
ceilings are measured before and after every round, and each model's files are read once before an engine starts, so
that no engine pays for the disk. Prints one table, and writes all figures as JSON after each new one. An interrupted
run still prints its table, and `--table FILE` prints one at any time.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.peers.engines import ENGINES, environment, interpreter, model_path
from benchmarks.peers.limits import FORMATS, least_seconds
from benchmarks.peers.results import Report, Results
from benchmarks.peers.workloads import Workload, WorkRequest, make_workloads
from quire.model_config import ModelConfig
from quire.simulation.model_shapes import ModelShape

ROOT = Path(__file__).parents[2]
WORKLOADS = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")
READ_BYTES = 2**24
LOOK_SECONDS = 1.0
"""Seconds between reads of a running engine's figures."""


class EngineFailed(Exception):
    """A run that ended before its last figure, with the end of its process's output."""


def main() -> None:
    options = parse_options()
    if options.table is not None:
        print(Results.load(options.table).table())
        return
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)  # they end a run like Ctrl-C
    results = Results(describe_machine(), options.model, {engine: [] for engine in options.engines})
    try:
        compare(options, results)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
    if not results.ceilings:
        sys.exit("nothing was measured")
    print(f"{results.table()}\n\nall figures: {options.output}")


def compare(options: argparse.Namespace, results: Results) -> None:
    add_ceilings(options, results)
    for repeat in range(options.repeats):
        for engine in options.engines:
            print(f"run {repeat + 1} of {options.repeats}: {engine} …", file=sys.stderr, flush=True)
            run: Report = {}
            try:
                for report in run_engine(engine, options):
                    if not run:
                        results.runs[engine].append(run)
                    run.update(report)
                    results.save(options.output)
            except EngineFailed as failure:  # keep its figures and go on with the other engines
                print(failure, file=sys.stderr, flush=True)
        add_ceilings(options, results)


def add_ceilings(options: argparse.Namespace, results: Results) -> None:
    """Measure the ceilings once more. Limits use the best so far: a slow moment of the machine is no limit."""
    results.ceilings.append(measure_ceilings())
    best = {name: max(rates[name] for rates in results.ceilings) for name in results.ceilings[0]}
    results.limits = limits(options, best)
    results.save(options.output)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("peers", type=Path, nargs="?", help="folder made by python -m benchmarks.peers.prepare")
    add("--model", default="M160", help="a model of benchmarks.make_models (default: %(default)s)")
    add("--engines", default="quire,vllm", help=f"from {', '.join(ENGINES)} (default: %(default)s)")
    add("--only", default=",".join(WORKLOADS), help="workloads (default: %(default)s)")
    add("--repeats", type=int, default=3)
    add("--output", type=Path)
    add("--table", type=Path, metavar="FILE", help="measure nothing; print the table of a result file")
    options = parser.parse_args()
    options.engines, options.only = options.engines.split(","), options.only.split(",")
    for flag, chosen, known in (("engines", options.engines, ENGINES), ("only", options.only, WORKLOADS)):
        for name in chosen:
            if name not in known:
                parser.error(f"--{flag} has {name!r}; there are {', '.join(known)}")
    if options.table is not None:
        return options
    if options.peers is None:
        parser.error("name the folder made by python -m benchmarks.peers.prepare")
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


def run_engine(engine: str, options: argparse.Namespace) -> Iterator[Report]:
    """Run one fresh process of `engine`. Yields its figures as they come; shows its output only if it fails."""
    row = ENGINES[engine]
    python = interpreter(row, options.peers)
    read_files(model_path(row, options.peers, options.model))
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
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(row, options.peers, os.sched_getaffinity(0)),
                stdout=out,
                stderr=out,
                process_group=0,
            )
        written = ""
        try:
            while process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
                if report.exists() and written != (written := report.read_text()):
                    yield json.loads(written)
        finally:
            if process.returncode is None:  # interrupted: end it with all its child processes
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            words = log.read_text()[-4000:]
            raise EngineFailed(f"{engine} ended with status {process.returncode}; its last words:\n{words}")


def read_files(model: Path) -> None:
    """Read a file or folder once, so that the system's cache holds it if memory suffices."""
    for path in sorted(model.rglob("*")) if model.is_dir() else [model]:
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(READ_BYTES):
                    pass


def measure_ceilings() -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ceilings"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ceilings: dict[str, float] = json.loads(done.stdout)
    return ceilings


def limits(options: argparse.Namespace, rates: dict[str, float]) -> dict[str, Report]:
    """Least seconds of the workloads at these ceilings, in the form of an engine's figures."""
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
        f"limit {weights}": {
            "seconds": {name: least_seconds(model, each, rates, weights) for name, each in workloads.items()}
        }
        for weights in FORMATS
    }


def describe_machine() -> str:
    cpu = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        listed = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True).stdout
        names = [row["data"] for row in json.loads(listed)["lscpu"] if row["field"] == "Model name:"]
        cpu = names[0] if names else cpu
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}"


if __name__ == "__main__":
    main()
