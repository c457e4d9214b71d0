"""What Phi has that Llama has not: one LayerNorm for both halves of a layer, biases everywhere, norms with a bias."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers
from tests.paged_model import PagedModel


def rope(share: float, theta: float = 10000.0) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}}


@pytest.mark.parametrize("qk_layernorm", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 1, "layer_norm_eps": 1e-3},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"hidden_act": "gelu", **rope(1.0, 5000.0)},
        {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 3, "num_key_value_heads": 3, **rope(0.4)},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], qk_layernorm: bool, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "phi", qk_layernorm=qk_layernorm, **overrides))


@pytest.mark.parametrize("family", ["phi", "phi-norms"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


def test_old_configs(tmp_path: Path) -> None:
    """They leave out what is rotated, and the number of KV heads is null."""
    folder = make_checkpoint(tmp_path, "phi", num_key_value_heads=4)
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("rope_parameters")["partial_rotary_factor"] == 0.5
    path.write_text(json.dumps({**config, "rope_theta": 10000.0, "num_key_value_heads": None}))
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lm_head.bias", "260"),
        ("model.final_layernorm.bias", "64"),
        ("model.layers.1.mlp.fc1.bias", "112"),
        ("model.layers.2.self_attn.k_layernorm.bias", "16"),
    ],
)
def test_a_bias_that_is_missing(name: str, shape: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "phi-norms")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"tensor {name} of shape \[{shape}\] is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_norms_of_heads_that_the_config_does_not_have(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "phi-norms")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "qk_layernorm": False}))
    with pytest.raises(CheckpointError, match=r"12 tensors are not part of the model .*k_layernorm"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu6"}, 'hidden_act is "relu6"; supported: silu'),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; supported: a divisor of num_attention_heads 4"),
        (
            rope(0.35),
            "rope_parameters.partial_rotary_factor is 0.35; supported: .* even number of a head's 16 elements",
        ),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "phi") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
