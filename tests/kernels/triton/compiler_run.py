"""What a module of this package prints with Triton's compiler, in a process of its own: this one interprets, and Triton
decides that for good when it is imported."""

import json
import os
import subprocess
import sys
from typing import Any


def run_with_compiler(module: str) -> list[Any]:
    """The JSON of each line that `module` prints, which sees no card."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.triton.{module}"],
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
