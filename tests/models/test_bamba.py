"""What Bamba has that Granite 4 hybrid has not: a list of the layers with attention, which rotate half of each head."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import CheckpointError
from quire.model_config import ModelConfig
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers


@pytest.mark.parametrize(
    "overrides",
    [
        {"attn_layer_indices": [0, 3], "mlp_bias": True, "attention_bias": True},
        {"mamba_n_groups": 4, "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_equals_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "bamba", **overrides))


@pytest.mark.parametrize("layers", [[], [4], [-1], [True], ["2"], "2", [2.0], {"2": 1}])
def test_layers_that_do_not_exist(layers: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "bamba") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_layer_indices": layers}))
    with pytest.raises(
        CheckpointError, match=r"attn_layer_indices is .*; supported: a list of the layers with attention"
    ):
        ModelConfig.from_folder(tmp_path)
