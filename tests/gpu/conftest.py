"""Off a card these tests are a rehearsal: what a card will run, small, on a CPU in Triton's interpreter (rehearsal.py).

Without Triton there is little to collect: `make test-gpu-offline` makes an environment that has it.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from benchmarks.from_sources import ENGINE_NEEDS, missing
from benchmarks.gpu_kernels import Card
from tests.gpu.rehearsal import NoCard, pretend

ON_CARD = torch.cuda.is_available()
if not ON_CARD:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
collect_ignore_glob = [] if ON_CARD or importlib.util.find_spec("triton") else ["test_engine.py", "test_rehearsal.py"]
if missing(ENGINE_NEEDS):
    collect_ignore_glob.append("test_engine.py")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card, or what stands for it; whoever asks an engine for CUDA gets it."""
    if ON_CARD:
        return Card()
    pretend(monkeypatch)
    return NoCard()


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")
