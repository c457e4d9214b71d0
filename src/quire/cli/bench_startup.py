"""`quire bench startup`: seconds from the start of a process to its first token."""

import statistics
import subprocess
import sys
import time
from typing import Any

from quire.cli.bench_workload import show
from quire.cli.options import ModelArgument, OutputJson, flags
from quire.config import EngineConfig
from quire.errors import QuireError


@flags(EngineConfig)
def startup(model: ModelArgument = "", *, num_iters: int = 3, output_json: OutputJson = None, **options: Any) -> None:
    """Measure the seconds from the start of a process to its first token, in fresh processes.

    Parameters
    ----------
    num_iters
        Processes to start. The first may read the model from disk, the others from the page cache.
    """
    EngineConfig.from_options({"model": model, **options})
    command = [sys.executable, "-m", "quire", "generate", "The", "--max-tokens", "1", "--ignore-eos"]
    command += ["--model", model] if model else []
    for name, value in options.items():
        for item in value if isinstance(value, tuple) else [value]:
            command.append(f"--{name.replace('_', '-')}={item}")
    times = [_seconds_to_first_byte(command) for _ in range(num_iters)]
    result = {
        "mean_first_token_seconds": statistics.fmean(times),
        "min_first_token_seconds": min(times),
        "max_first_token_seconds": max(times),
        "first_token_seconds": times,
    }
    show(f"start-up of {model or 'the bundled model'}, {num_iters} processes", result, output_json)


def _seconds_to_first_byte(command: list[str]) -> float:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        elapsed = time.perf_counter() - started
        _, errors = process.communicate()
    if not first or process.returncode:
        raise QuireError(f"the measured process failed: {errors.decode(errors='replace').strip()[-500:]}")
    return elapsed
