"""What docs/models.md says of every family: its parameters are counted exactly, its logits are as near as written."""

import json
from pathlib import Path

import pytest

from quire.model_config import ARCHITECTURES, ModelConfig
from quire.model_config.encoder_architectures import ENCODER_ARCHITECTURES
from scripts.write_models_page import PARITY, SAME_CODE
from tests.checkpoints import FAMILIES, make_checkpoint, reference_model
from tests.models.parity import TOLERANCE, largest_difference

MEASURED: dict[str, float] = json.loads(PARITY.read_text())
FACTOR = 8
"""How much instruction sets and numbers of threads may change the rounding."""


@pytest.mark.parametrize("family", list(FAMILIES))
def test_parameters_and_logits(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    config = ModelConfig.from_folder(folder)
    assert config.spec.num_parameters == reference_model(folder).num_parameters()
    error = largest_difference(folder)
    assert error <= min(TOLERANCE, FACTOR * MEASURED[config.architecture])


def test_every_row_was_measured() -> None:
    assert MEASURED.keys() | SAME_CODE.keys() == ARCHITECTURES.keys() - ENCODER_ARCHITECTURES.keys()
    assert not MEASURED.keys() & SAME_CODE.keys()
    assert set(SAME_CODE.values()) <= MEASURED.keys()
    assert all(0 < error <= TOLERANCE for error in MEASURED.values())
