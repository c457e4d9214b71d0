"""What GPT-J has that Llama has not: one LayerNorm for both halves of a layer, rotated pairs, a bias of the head."""

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
        {"rotary_dim": 32},
        {"rotary_dim": 2, "n_head": 1},
        {"n_embd": 60, "n_head": 3, "rotary_dim": 6, "n_inner": 101},
        {"n_inner": 72, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": True},
        # 98 * (2 / 98) is less than 2 in floating point.
        {"n_embd": 98, "n_head": 1, "rotary_dim": 2},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gptj", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gptj"), kernels=reference, block_size=8)


def test_stored_masks_of_old_checkpoints(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gptj")
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    file = folder / "model.safetensors"
    masks = {"attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.bool), "attn.masked_bias": torch.tensor(-1e9)}
    save_file({**load_file(file), **{f"transformer.h.2.{name}": mask for name, mask in masks.items()}}, file)
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_bias_of_the_head_that_is_missing(tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gptj", tie_word_embeddings=tied)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"tensor lm_head.bias of shape \[260\] is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 34}, "rotary_dim is 34; supported: an even number of at most a head's 32 elements"),
        ({"rotary_dim": 7}, "rotary_dim is 7; supported: an even number of at most a head's 32 elements"),
        ({"rotary_dim": 0}, "rotary_dim is 0; supported: an integer of at least 1"),
        ({"rotary_dim": "8"}, 'rotary_dim is "8"; supported: an integer of at least 1'),
        ({"activation_function": "hard_swish"}, 'activation_function is "hard_swish"; supported: silu'),
        ({"n_head": 3}, "n_embd is 64; supported: a multiple of num_attention_heads 3"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gptj") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)


def test_another_family_does_not_read_the_number_of_rotated_elements(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama") / "config.json"
    expected = ModelConfig.from_folder(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "rotary_dim": 8}))
    assert ModelConfig.from_folder(tmp_path) == expected
