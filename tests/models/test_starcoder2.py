"""What StarCoder2 has that Llama has not: LayerNorms and a plain MLP, with biases or without."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_bias": False},
        {"sliding_window": None},
        {"sliding_window": 7, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "hidden_act": "gelu"},
        {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 6, "num_key_value_heads": 3},
        {"tie_word_embeddings": False, "norm_epsilon": 1e-3},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "starcoder2", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "starcoder2"), kernels=reference, block_size=8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp.c_fc.bias", "[112]"), ("mlp.c_proj.weight", "[64, 112]"), ("self_attn.o_proj.bias", "[64]")],
)
def test_a_tensor_that_is_missing(name: str, shape: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "starcoder2")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.2.{name}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    assert f"model.layers.2.{name} of shape {shape} is missing" in str(error.value)


def test_biases_that_the_config_denies(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "starcoder2")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_bias": False}))
    with pytest.raises(CheckpointError, match=r"18 tensors are not part of the model"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
