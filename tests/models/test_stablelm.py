"""What StableLM has that Llama has not: LayerNorms, rotation of a part of each head, parallel residuals, head norms."""

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


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_parallel_residual": True},
        {"qk_layernorm": True},
        {"use_qkv_bias": True},
        {"qk_layernorm": True, "num_key_value_heads": 4},
        {"use_parallel_residual": True, "num_key_value_heads": 1, "hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}},
        {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 3, "num_key_value_heads": 3}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.3}},
        {"tie_word_embeddings": True, "layer_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "stablelm", **overrides))


@pytest.mark.parametrize("family", ["stablelm", "stablelm-parallel"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


def test_the_share_that_is_rotated_by_default(tmp_path: Path) -> None:
    """Old files leave it unsaid, and say rope_theta beside it."""
    folder = make_checkpoint(tmp_path, "stablelm")
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("rope_parameters")["partial_rotary_factor"] == 0.25
    path.write_text(json.dumps({**config, "rope_theta": 10000}))
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


def test_a_norm_of_a_head_that_is_missing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "stablelm-parallel")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_layernorm.norms.1.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_layernorm.norms.1.weight of shape \[16\] is miss"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_a_second_norm_beside_a_parallel_residual(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "stablelm")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_parallel_residual": True}))
    with pytest.raises(CheckpointError, match=r"6 tensors are not part of the model .*post_attention_layernorm"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize("share", [0.3, 0.01])
def test_a_share_that_is_no_pairs(share: float, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "stablelm")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["partial_rotary_factor"] = share * 17 / 16
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor is .*; supported: .* an even number"):
        ModelConfig.from_folder(folder)
