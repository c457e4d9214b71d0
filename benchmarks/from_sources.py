"""Quire from its sources alone, for machines with a GPU that cannot install it.

`make test-gpu` and `make bench-gpu` install Quire first. A machine without a network has PyTorch and Triton and little
else; there the two modules run on `src` directly. Everything below `engine`, and `engine/core.py`, needs torch, numpy,
safetensors, tokenizers and triton. Quire's C++ extension is needed only for CPU kernels; `kernels/reference.py` can
replace it.
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ENGINE_NEEDS = ("transformers", "msgspec", "jinja2", "llguidance")
"""Packages that tests of the whole engine also import: the oracle, and everything above the engine's core."""
SOURCES = Path(__file__).resolve().parents[1] / "src"


def use_sources() -> list[str]:
    """Make `import quire` work on this machine. Call it before importing Quire. Returns a note for each replacement."""
    notes = []
    if find_spec("quire") is None:
        sys.path.insert(0, str(SOURCES))
        notes.append("Quire is not installed: its sources are used")
    if find_spec("quire.kernels._cpu") is None:
        sys.modules["quire.kernels.cpu"] = import_module("quire.kernels.reference")
        notes.append("Quire's C++ extension is not built: kernels/reference.py replaces the CPU kernels")
    return notes


def missing(packages: Iterable[str]) -> list[str]:
    """The packages that are not installed."""
    return [package for package in packages if find_spec(package) is None]
