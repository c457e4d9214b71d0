"""What EXAONE-MoE has that GLM-4.5 has not: windows, and a router's bias that lies beside its matrix."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers

BESIDE, BELOW = "model.layers.1.mlp.e_score_correction_bias", "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "num_shared_experts": 2},
        {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"], "layer_types": ["full_attention"] * 4},
    ],
    ids=str,
)
def test_equals_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "exaone-moe", **overrides))


def test_both_places_of_the_bias_and_further_predictors(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path, "exaone-moe") / "model.safetensors"
    tensors = load_file(file)
    stored, other = (BESIDE, BELOW) if BESIDE in tensors else (BELOW, BESIDE)
    tensors[other] = tensors.pop(stored)
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.ones(64)
    save_file(tensors, file)
    assert_equals_transformers(tmp_path)
