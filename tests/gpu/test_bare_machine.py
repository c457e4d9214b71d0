"""A machine that is lent for minutes has little installed: both suites run there, and say what they left out."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


def test_both_suites_run_on_little(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.bare_machine", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    bench, tests = ((tmp_path / name).read_text() for name in ("bench.md", "tests.md"))
    assert "failed" not in bench
    assert "| 0.6B decode, batch 4, 1k context | " in bench
    assert "| 0.6B against transformers | not measured: transformers is not installed |" in bench
    assert "| decode against FlashInfer | not measured: flashinfer is not installed |" in bench
    title = tests.splitlines()[0]
    assert title.startswith("No card: a rehearsal")
    assert "C++ extension is not built" in title
    assert "tests/gpu/test_engine.py was left out: transformers, msgspec, jinja2, llguidance not installed" in title
    assert "| tests/kernels/triton/test_attention.py::test_slopes | 1 passed |" in tests
    assert "| tests/kernels/triton/test_small_kernels.py::test_copy_blocks | 2 passed |" in tests
