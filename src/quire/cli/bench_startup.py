"""`quire bench startup`: seconds from the start of a process to its first token, beside the least that it can take: to
read the files of the weights, and to import torch."""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.cli.bench_workload import check_counts, show
from quire.cli.options import ModelArgument, OutputJson, flags
from quire.config import EngineConfig
from quire.engine.checkpoint import find_model, weight_files
from quire.engine.memory_plan import plan_memory
from quire.engine.model_task import read_model
from quire.errors import QuireError

_PIECE_BYTES = 1 << 20
_KIB = 1024


@flags(EngineConfig)
def startup(model: ModelArgument = "", *, num_iters: int = 3, output_json: OutputJson = None, **options: Any) -> None:
    """Measure the seconds from the start of a process to its first token, and its memory, in fresh processes.

    Each is started after the two floors were measured: reading the weights' files once, and a process that imports
    torch. `ratio_to_floor` is the median of first token over the sum of both.

    Parameters
    ----------
    num_iters
        Processes to start.
    """
    check_counts(num_iters=num_iters)
    config = EngineConfig.from_options({"model": model, **options})
    folder = find_model(config.model, config.revision)
    weights = plan_memory(config, read_model(config, folder)).weights
    command = [sys.executable, "-m", "quire", "generate", "The", "--max-tokens", "1", "--ignore-eos"]
    command += ["--model", model] if model else []
    for name, value in options.items():
        for item in value if isinstance(value, tuple) else [value]:
            command.append(f"--{name.replace('_', '-')}={item}")
    files = weight_files(folder)
    _read(files)  # the first reading may come from the disk
    runs = [_turn(files, command) for _ in range(num_iters)]
    reading, importing, times, cpu = zip(*runs, strict=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _KIB
    result = {
        "mean_first_token_seconds": statistics.fmean(times),
        "min_first_token_seconds": min(times),
        "max_first_token_seconds": max(times),
        "first_token_seconds": times,
        "median_read_seconds": statistics.median(reading),
        "median_import_torch_seconds": statistics.median(importing),
        "ratio_to_floor": statistics.median(run[2] / (run[0] + run[1]) for run in runs),
        "median_cpu_seconds": statistics.median(cpu),
        "peak_mib": peak / 2**20,
        "peak_beside_weights_mib": (peak - weights) / 2**20,
    }
    show(f"start-up of {model or 'the bundled model'}, {num_iters} processes", result, output_json)


def _turn(files: Sequence[Path], command: Sequence[str]) -> tuple[float, float, float, float]:
    """Seconds of reading, of importing torch and to the first token, and seconds of all cores for the last."""
    reading = _read(files)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    importing = time.perf_counter() - began
    before = _cpu_seconds()
    first_token = _seconds_to_first_byte(command)
    return reading, importing, first_token, _cpu_seconds() - before


def _read(files: Sequence[Path]) -> float:
    """Seconds to read every byte once."""
    buffer = bytearray(_PIECE_BYTES)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def _cpu_seconds() -> float:
    """CPU time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _seconds_to_first_byte(command: Sequence[str]) -> float:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        elapsed = time.perf_counter() - started
        _, errors = process.communicate()
    if not first or process.returncode:
        raise QuireError(f"the measured process failed: {errors.decode(errors='replace').strip()[-500:]}")
    return elapsed
