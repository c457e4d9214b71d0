"""Experts in the place of the MLP: both ways of storing them, odd numbers of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 3},
        {"num_local_experts": 5},
        {"num_local_experts": 5, "num_experts_per_tok": 5},
        {"num_local_experts": 1, "num_experts_per_tok": 1},
        {"sliding_window": 9, "head_dim": 20, "tie_word_embeddings": True},
        {"hidden_size": 60, "intermediate_size": 100, "hidden_act": "gelu"},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "mixtral", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "mixtral"), kernels=reference, block_size=8)


def test_one_token(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral", num_local_experts=5, num_experts_per_tok=3)
    ids = prompt(12)
    model = PagedModel(folder)
    found = torch.cat([model.step({0: [token]})[0] for token in ids])
    assert_close(found, expected_logits(folder, ids))


def fuse(folder: Path) -> dict[str, Tensor]:
    """Store the experts of every layer in one tensor, as transformers 5 holds them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        w1, w2, w3 = (
            [tensors.pop(f"{prefix}block_sparse_moe.experts.{index}.{name}.weight") for index in range(4)]
            for name in ("w1", "w2", "w3")
        )
        tensors[f"{prefix}mlp.gate.weight"] = tensors.pop(f"{prefix}block_sparse_moe.gate.weight")
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat((torch.stack(w1), torch.stack(w3)), dim=1)
        tensors[f"{prefix}mlp.experts.down_proj"] = torch.stack(w2)
    save_file(tensors, file)
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_experts_in_one_tensor(dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    ids = prompt(20)
    expected = PagedModel(folder, dtype).step({0: ids})[0]
    fuse(folder)
    assert torch.equal(PagedModel(folder, dtype).step({0: ids})[0], expected)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    return str(caught.value).replace(str(folder), "FOLDER")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, file)
    assert refusal(folder) == (
        "FOLDER: tensor model.layers.1.block_sparse_moe.experts.2.w3.weight of shape [112, 64] is missing; under "
        "model.layers.1.block_sparse_moe.experts.2. it has model.layers.1.block_sparse_moe.experts.2.w1.weight, "
        "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    )


def test_fewer_experts_than_the_config_says(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    change_config(folder, num_local_experts=5)
    assert "block_sparse_moe.gate.weight has shape [4, 64], expected [5, 64] by config.json" in refusal(folder)
    fuse(folder)
    assert "mlp.gate.weight has shape [4, 64], expected [5, 64] by config.json" in refusal(folder)


def test_fused_experts_of_the_wrong_shape(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    tensors = fuse(folder)
    name = "model.layers.2.mlp.experts.down_proj"
    save_file({**tensors, name: tensors[name].transpose(1, 2).contiguous()}, folder / "model.safetensors")
    assert refusal(folder) == (
        f"FOLDER/model.safetensors: tensor {name} has shape [4, 112, 64], expected [4, 64, 112] by config.json"
    )


def test_an_expert_that_is_left_over(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.block_sparse_moe.experts.4.w1.weight": torch.zeros(112, 64)}, file)
    assert "1 tensors are not part of the model config.json describes" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; supported: at most the number of experts 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; supported: an integer of at least 1"),
        ({"num_local_experts": 2.5}, "num_local_experts is 2.5; supported: an integer of at least 1"),
        ({"hidden_act": "relu6"}, 'hidden_act is "relu6"; supported: silu'),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    change_config(folder, **change)
    assert message in refusal(folder)
