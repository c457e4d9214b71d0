"""`python -m benchmarks.peers --model-dir DIR --vllm-python PATH`: Quire and vLLM's CPU build, side by side.

Every repeat of every engine is a fresh process in its own interpreter, and the engines take turns (A B A B),
so that the slow drift of a machine falls on both. Prints one table and writes all figures as JSON.
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
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from benchmarks.peers.workloads import make_workloads

ROOT = Path(__file__).parents[2]
ENGINES = ("quire", "vllm", "vllm-eager")
WORKLOADS = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")
TITLES = {name: workload.title for name, workload in make_workloads().items()} | {
    "W4-sampled": "as many samples instead of beams",
    "W5-first-token": "single stream, no more than that",
    "W7": "process start to first token",
}

Report = dict[str, Any]


def main() -> None:
    options = parse_options()
    reports: dict[str, list[Report]] = {engine: [] for engine in options.engines}
    ceilings = measure_ceilings(options.quire_python)
    for repeat in range(options.repeats):
        for engine in options.engines:
            print(f"run {repeat + 1} of {options.repeats}: {engine} …", file=sys.stderr, flush=True)
            reports[engine].append(run_engine(engine, options))
    figures = {engine: gather(runs) for engine, runs in reports.items()}
    print(table(options, figures, ceilings))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(
            {
                "machine": describe_machine(),
                "model": options.model_dir.name,
                "dtype": options.dtype,
                "quantization": options.quantization,
                "ceilings": ceilings,
                "runs": reports,
            },
            indent=1,
        )
    )
    print(f"\nall figures: {options.output}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, help="a checkpoint of benchmarks.make_models")
    add("--dtype", default="float32")
    add("--quantization", help="int8 or int4, of Quire's weights; vLLM keeps its dtype")
    add("--vllm-python", type=Path, help="interpreter of an environment with vLLM's CPU build")
    add("--quire-python", type=Path, default=Path(sys.executable))
    add("--engines", default="quire,vllm", help=f"from {', '.join(ENGINES)} (default: %(default)s)")
    add("--only", default="W1,W2,W3,W7", help=f"from {', '.join(WORKLOADS)} (default: %(default)s)")
    add("--repeats", type=int, default=3)
    add("--output", type=Path)
    options = parser.parse_args()
    options.engines, options.only = options.engines.split(","), options.only.split(",")
    for flag, chosen, known in (("engines", options.engines, ENGINES), ("only", options.only, WORKLOADS)):
        for name in chosen:
            if name not in known:
                parser.error(f"--{flag} has {name!r}; there are {', '.join(known)}")
    if options.engines != ["quire"] and options.vllm_python is None:
        parser.error("name the interpreter that has vLLM with --vllm-python, or run --engines quire")
    if not (options.model_dir / "config.json").exists():
        parser.error(f"{options.model_dir} has no config.json; python -m benchmarks.make_models makes models")
    options.model_dir = options.model_dir.resolve()
    if options.output is None:
        options.output = ROOT / "benchmarks" / "results" / f"peers-{options.model_dir.name}.json"
    return options


def run_engine(engine: str, options: argparse.Namespace) -> Report:
    """One fresh process of `engine`; what it printed is shown only if it fails."""
    python = options.quire_python if engine == "quire" else options.vllm_python
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if engine != "quire":
        environment |= vllm_environment(python)
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        arguments = {
            "--engine": engine.removesuffix("-eager"),
            "--model": options.model_dir,
            "--dtype": options.dtype,
            "--only": ",".join(options.only),
            "--report": report,
            "--started-at": time.monotonic(),
        }
        command = [str(python), "-m", "benchmarks.peers.engine_run"]
        command += [str(word) for pair in arguments.items() for word in pair]
        command += ["--eager"] * engine.endswith("-eager")
        if options.quantization and engine == "quire":
            command += ["--quantization", options.quantization]
        with log.open("w") as out:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False)
        if done.returncode or not report.exists():
            words = log.read_text()[-4000:]
            sys.exit(f"{engine} ended with status {done.returncode}; its last words:\n{words}")
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


def measure_ceilings(python: Path) -> dict[str, float]:
    command = [str(python), "-m", "benchmarks.ceilings"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ceilings: dict[str, float] = json.loads(done.stdout)
    return ceilings


def gather(runs: list[Report]) -> dict[str, list[float]]:
    """Seconds of every run, by workload."""
    return {name: [run["seconds"][name] for run in runs] for name in runs[0]["seconds"]}


def table(options: argparse.Namespace, figures: dict[str, dict[str, list[float]]], ceilings: dict[str, float]) -> str:
    """Markdown: a row per workload with medians, ranges, and each other engine's time over the first's."""
    first, *others = figures
    names = [name for name in figures[first] if name != "W7" or "W7" in options.only]
    heads = ["workload", *(f"{engine}, s" for engine in figures), *(f"{other} / {first}" for other in others)]
    rows = [heads, ["---"] * len(heads)]
    for name in names:
        medians = {engine: statistics.median(seconds[name]) for engine, seconds in figures.items()}
        cells = [with_range(seconds[name]) for seconds in figures.values()]
        ratios = [f"{medians[other] / medians[first]:.2f}" for other in others]
        rows.append([f"{name} {TITLES[name]}", *cells, *ratios])
    weights = options.quantization or options.dtype
    lines = [
        f"{options.model_dir.name}, {weights}, {options.repeats} runs each, median [least, most]",
        f"{describe_machine()}; fp32 matrix product {ceilings['fp32_gflops']} GFLOP/s, "
        f"int8 {ceilings['int8_gops']} GOP/s, memory read {ceilings['read_gb_per_s']} GB/s",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def with_range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def describe_machine() -> str:
    cpu = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        listed = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True).stdout
        names = [row["data"] for row in json.loads(listed)["lscpu"] if row["field"] == "Model name:"]
        cpu = names[0] if names else cpu
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}"


if __name__ == "__main__":
    main()
