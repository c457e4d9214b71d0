"""The Triton kernels as a fixture: on a GPU where there is one, else in Triton's interpreter.

Without Triton there is nothing to collect here: `make test-gpu-offline` makes an environment that has it, and runs
these tests.
"""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from quire.kernels import Kernels

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

# Without it cuBLAS warns where torch is asked to be deterministic, which is how fresh memory is poisoned here.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    import quire.kernels.triton

    return quire.kernels.triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
