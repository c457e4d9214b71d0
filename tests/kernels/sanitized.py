"""A pytest plugin for `make test-asan`: the tests use the kernels that were built with sanitizers, from build/asan.

Such kernels end the process at the first access beyond an array and at the first undefined operation.
"""

import importlib.util
import sys
from pathlib import Path

import quire.kernels

NAME = "quire.kernels._cpu"


def _load() -> None:
    (path,) = (Path(__file__).parents[2] / "build" / "asan").glob("_cpu*.so")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    quire.kernels._cpu = module


_load()
