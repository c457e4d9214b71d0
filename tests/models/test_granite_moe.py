"""Granite-MoE: a softmax over the chosen experts alone, Granite's factors, and experts in one tensor."""

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
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 1, "head_dim": 20, "attention_bias": True},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "num_experts_per_tok": 1},
        {"hidden_size": 60, "num_local_experts": 5, "num_experts_per_tok": 5, "hidden_act": "gelu"},
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "granite-moe", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "granite-moe"), kernels=reference, block_size=8)


PUBLISHED = {
    "router.layer.weight": "router.weight",
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
}
"""Names in published checkpoints → those that transformers 5 holds in memory."""


def test_both_names_of_the_experts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "granite-moe")
    ids = prompt(20)
    expected = PagedModel(folder).step({0: ids})[0]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        for name, other in PUBLISHED.items():
            block = f"model.layers.{layer}.block_sparse_moe."
            tensors[block + other] = tensors.pop(block + name)
    save_file(tensors, file)
    assert torch.equal(PagedModel(folder).step({0: ids})[0], expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_that_are_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "granite-moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.block_sparse_moe.{name}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"tensor model.layers.1.block_sparse_moe.{name} of shape"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
