"""Checkpoints of few bits compute what transformers computes from the floats that their bits stand for."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.models.parity import TOLERANCE, assert_close, expected_logits, prompt
from tests.models.stored.packers import CASES, pack_checkpoint
from tests.paged_model import PagedModel


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=1, intermediate_size=96)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, llama: Path, tmp_path: Path) -> None:
    folder = pack_checkpoint(llama, tmp_path, CASES[name])
    ids = prompt(20)
    model = PagedModel(folder)
    found = torch.cat([model.step({0: ids[:13]})[0], model.step({0: ids[13:]})[0]])
    assert_close(found, expected_logits(tmp_path / "floats", ids))
    assert (expected_logits(llama, ids) - found).abs().max() > TOLERANCE  # the bits are few
