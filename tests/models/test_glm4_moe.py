"""GLM-4.5: a sigmoid router with a bias and groups, shared experts, dense layers first, partial rotation."""

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
from tests.models.parity import assert_equals_transformers, prompt
from tests.models.test_qwen_moe import fuse
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_group": 1, "topk_group": 1, "use_qk_norm": False, "attention_bias": False},
        {"n_routed_experts": 5, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 5, "n_shared_experts": 2},
        {"first_k_dense_replace": 0, "norm_topk_prob": False, "tie_word_embeddings": True},
        {"first_k_dense_replace": 2, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "hidden_act": "gelu"},
        {"hidden_size": 60, "head_dim": 20, "num_key_value_heads": 1, "routed_scaling_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "glm4-moe", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "glm4-moe"), kernels=reference, block_size=8)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "glm4-moe")
    ids = prompt(20)
    expected = PagedModel(folder).step({0: ids})[0]
    fuse(folder)
    assert torch.equal(PagedModel(folder).step({0: ids})[0], expected)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_old_files_leave_unsaid(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "glm4-moe")
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("rope_parameters")["partial_rotary_factor"] == 0.5
    del config["first_k_dense_replace"], config["n_shared_experts"], config["norm_topk_prob"]
    path.write_text(json.dumps({**config, "rope_theta": 10000}))
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    return str(caught.value)


def test_the_layer_of_the_token_after_the_next_is_left(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "glm4-moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.46.eh_proj.weight": torch.ones(2)}, file)
    PagedModel(folder)
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.ones(2)}, file)
    assert "1 tensors are not part of the model config.json describes" in refusal(folder)


@pytest.mark.parametrize("name", ["gate.e_score_correction_bias", "shared_experts.up_proj.weight"])
def test_tensors_that_are_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "glm4-moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.{name}"]
    save_file(tensors, file)
    assert f"tensor model.layers.1.mlp.{name} of shape" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, "n_group is 3; supported: a divisor of the number of experts 8"),
        ({"n_group": 8}, "n_group is 8; supported: a divisor of the number of experts 8 that leaves a group two"),
        ({"topk_group": 5}, "topk_group is 5; supported: at most the number of groups 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; supported: at most the 4 experts of 2 groups"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0; supported: a positive number"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1; supported: an integer of at least 0"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "glm4-moe")
    change_config(folder, **change)
    assert message in refusal(folder)
