"""Seconds from the start of a process to its first token, by phase: packing the checkpoint, and with cached weights.

`python -m benchmarks.startup MODEL [MODEL ...]`. All variants start in turns, round after round, each in a fresh
process that answers a prompt of 128 tokens with one token. A second prompt of the same length shows which costs come
only once. Files are in the system's file cache: they are read once before the clock starts. Ceilings come from the
same run.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_PROMPT_TOKENS = 128
PHASES = ("interpreter", "import quire", "tokenizer", "import torch", "weights", "rest of load", "prompt")


def child(model: str, started_at: float, options: dict[str, Any]) -> None:
    """The measured process: prints its phases as one line of JSON."""
    seconds = {"interpreter": time.monotonic() - started_at}
    began = time.monotonic()
    from quire import LLM, SamplingParams

    seconds["import quire"] = time.monotonic() - began
    reported: dict[str, float] = {}

    class Lines:
        """Replaces standard error, to read the phases that the engine reports."""

        def write(self, text: str) -> int:
            name, _, value = text.strip().rpartition(": ")
            if value.endswith(" s"):
                reported[name.removesuffix(" from the cache")] = float(value[:-2])
            return len(text)

        def flush(self) -> None:
            pass

    began, sys.stderr = time.monotonic(), Lines()  # print needs only write
    llm = LLM(model=model, max_model_len=4096, max_num_seqs=64, verbose=True, **options)
    sys.stderr = sys.__stderr__
    loaded = time.monotonic() - began
    seconds |= {name: reported.get(name, 0.0) for name in ("tokenizer", "import torch", "weights")}
    seconds["rest of load"] = loaded - sum(seconds[name] for name in ("tokenizer", "import torch", "weights"))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for name, first in (("prompt", 100), ("second prompt", 300)):
        began = time.monotonic()
        llm.generate({"prompt_token_ids": list(range(first, first + NUM_PROMPT_TOKENS))}, params, use_tqdm=False)
        seconds[name] = time.monotonic() - began
        seconds.setdefault("first token", time.monotonic() - started_at)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps(seconds | {"peak GB": int(peak.split()[1]) * 1024 / 1e9}), flush=True)
    llm.close()


def start(model: str, options: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.startup", "--child", json.dumps(options), model]
    done = subprocess.run(
        [*command, "--started-at", str(time.monotonic())], check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def ceilings(model: Path) -> dict[str, float]:
    """GB/s of one thread: writing fresh memory, writing it again, reading the checkpoint from the file cache."""
    import numpy as np

    found, size = {}, 1 << 30
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    for name in ("fresh memory", "memory"):
        began = time.perf_counter()
        array.fill(1)
        found[name] = size / (time.perf_counter() - began) / 1e9
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            began, count = time.perf_counter(), 0
            while got := file.readinto(array.data[: 16 << 20]):
                count += got
            found["file cache"] = count / (time.perf_counter() - began) / 1e9
    return found


def measure(model: str, repeats: int, cases: dict[str, dict[str, Any]]) -> None:
    for path in Path(model).glob("*.safetensors"):
        path.read_bytes()
    rates = ceilings(Path(model))
    print(f"\n{Path(model).name}: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for options in cases.values():
        if "weights_cache" in options:
            start(model, options)  # fills it
    for _ in range(repeats):
        for name, options in cases.items():
            runs[name].append(start(model, options))
    print(f"{'':18}{'first token':>22}" + "".join(f"{name:>14}" for name in (*PHASES, "second prompt", "peak GB")))
    for name, results in runs.items():
        totals = sorted(result["first token"] for result in results)
        line = f"{name:18}{statistics.median(totals):7.2f} [{totals[0]:.2f}, {totals[-1]:.2f}]".ljust(40)
        for phase in (*PHASES, "second prompt", "peak GB"):
            line += f"{statistics.median(result[phase] for result in results):14.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="cases to run, as int8,int8-cached")
    parser.add_argument("--cache", help="folder for packed weights; a temporary one if left out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--started-at", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.models[0], arguments.started_at, json.loads(arguments.child))
    with tempfile.TemporaryDirectory() as folder:
        cached = {"weights_cache": arguments.cache or folder}
        cases: dict[str, dict[str, Any]] = {
            "float32": {"dtype": "float32"},
            "float32-cached": {"dtype": "float32", **cached},
            "int8": {"quantization": "int8"},
            "int8-cached": {"quantization": "int8", **cached},
            "int4": {"quantization": "int4"},
            "int4-cached": {"quantization": "int4", **cached},
        }
        wanted = arguments.only.split(",") if arguments.only else list(cases)
        print(f"{os.cpu_count()} cores, {arguments.repeats} fresh processes each: median [min, max] s, phases' medians")
        for model in arguments.models:
            measure(model, arguments.repeats, {name: cases[name] for name in wanted})


if __name__ == "__main__":
    main()
