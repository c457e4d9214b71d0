"""What Apertus has that Llama has not: an activation whose numbers each layer has learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import XIELUActivation

from quire.errors import CheckpointError
from quire.model_config import ModelConfig
from quire.models.apertus import XIELU
from quire.models.safetensors_weights import SafetensorsWeights
from quire.models.weights import WeightScope
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers


@pytest.mark.parametrize("overrides", [{"attention_bias": True}, {"tie_word_embeddings": True}], ids=str)
def test_equals_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "apertus", **overrides))


def test_xielu(tmp_path: Path) -> None:
    theirs = XIELUActivation(alpha_p_init=1.3, alpha_n_init=0.9, beta=0.4, dtype=torch.float32)
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    ours = XIELU(WeightScope(SafetensorsWeights.open(tmp_path)))
    x = torch.cat([torch.linspace(-30, 30, 101), torch.tensor([-1e-7, 0.0, 1e-7])])[None]
    torch.testing.assert_close(ours(x), theirs(x).detach())


def test_other_activations_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "apertus") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "silu"}))
    with pytest.raises(CheckpointError, match='hidden_act is "silu"; supported: "xielu"'):
        ModelConfig.from_folder(tmp_path)


def test_a_learnt_number_is_missing(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path, "apertus") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.act_fn.alpha_n"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.act_fn.alpha_n of shape \[1\] is missing"):
        assert_equals_transformers(tmp_path)
