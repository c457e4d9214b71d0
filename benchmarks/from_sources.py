"""Quire from its sources alone: what a machine with a GPU may lack, and how the suites of a GPU do without.

`make test-gpu` and `make bench-gpu` install Quire first. A machine that is lent for minutes, without a network, has
PyTorch and Triton and little else: there the same two modules run on `src` as it lies there. Everything below `engine`,
and `engine/core.py`, needs torch, numpy, safetensors, tokenizers and triton, and Quire's C++ extension only for what
the CPU computes, of which `kernels/reference.py` is the slow twin.
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ENGINE_NEEDS = ("transformers", "msgspec", "jinja2", "llguidance")
"""What tests of the whole engine import beside that: the oracle, and what stands above the engine's core."""
SOURCES = Path(__file__).resolve().parents[1] / "src"


def use_sources() -> list[str]:
    """Make `import quire` work on this machine; call it before any of Quire is imported. Says what was stood in for."""
    notes = []
    if find_spec("quire") is None:
        sys.path.insert(0, str(SOURCES))
        notes.append("Quire is not installed: its sources are used")
    if find_spec("quire.kernels._cpu") is None:
        sys.modules["quire.kernels.cpu"] = import_module("quire.kernels.reference")
        notes.append("Quire's C++ extension is not built: what the CPU computes comes from kernels/reference.py")
    return notes


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [package for package in packages if find_spec(package) is None]
