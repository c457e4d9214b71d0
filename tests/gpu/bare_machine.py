"""Runs both suites of a GPU as on a machine that has torch, numpy, safetensors, tokenizers, triton and pytest alone.

    python -m tests.gpu.bare_machine FOLDER

What else is installed here cannot be imported, nor Quire's C++ extension. In FOLDER lie the tables afterwards.
"""

import os
import sys
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

HIDDEN = {
    "cyclopts", "fastapi", "flashinfer", "httptools", "httpx", "huggingface_hub", "hypothesis", "jinja2", "llguidance",
    "msgspec", "openai", "prometheus_client", "pydantic", "rich", "scipy", "starlette", "transformers", "uvicorn",
    "uvloop", "quire.kernels._cpu",
}  # fmt: skip


def hide() -> None:
    """Make the hidden packages and modules impossible to find; pytest, which asks the same finder, comes after this."""
    find = PathFinder.find_spec

    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if name in HIDDEN or name.partition(".")[0] in HIDDEN else find(name, path, target)

    # What finds an installed Quire: there is none on such a machine, only the sources.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
    # A partial is no method where pytest keeps it in a class of its own.
    PathFinder.find_spec = partial(find_spec)  # type: ignore[method-assign, assignment]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"


def main(folder: Path) -> int:
    hide()
    from benchmarks.from_sources import use_sources

    print(use_sources())
    import pytest

    from benchmarks import gpu
    from benchmarks.gpu_table import Table, measure_all
    from tests.gpu.__main__ import main as test_gpu
    from tests.gpu.rehearsal import NoCard, make_small, pretend

    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch)
        make_small(monkeypatch)
        card = NoCard()
        chosen = gpu.measurements(card, folder, ["0.6B", "transformers 0.6B", "flashinfer"])
        measure_all(chosen, Table(card.name, folder / "bench.md"), 1e9, clean_up=card.clean_up)
    return test_gpu(
        ["--rehearse", "--output", str(folder / "tests.md"), "-k", "copy_blocks or slopes or test_benchmark"]
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
