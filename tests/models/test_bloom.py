"""What BLOOM has that Llama has not: ALiBi, a norm of the embeddings, and the rows of each head together."""

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
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_head": 1},
        {"n_head": 2, "hidden_size": 68},
        {"n_head": 3, "hidden_size": 60},
        {"n_head": 12, "hidden_size": 60},
        {"n_head": 8, "layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": False},
        {"slow_but_exact": True},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "bloom", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "bloom"), kernels=reference, block_size=8)


def test_a_long_prompt_in_pieces(tmp_path: Path) -> None:
    """Biases of hundreds, and pieces of keys that threads share."""
    folder = make_checkpoint(tmp_path, "bloom", seq_length=1024, n_head=6, hidden_size=72)
    ids = prompt(1000)
    model = PagedModel(folder)
    steps = [ids[:700], ids[700:701], ids[701:990], *([token] for token in ids[990:])]
    assert_close(torch.cat([model.step({0: step})[0] for step in steps]), expected_logits(folder, ids))


def test_bare_names_of_published_checkpoints(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "bloom")
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "h.0.self_attention.dense.bias" in tensors
    save_file(tensors, file)
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("word_embeddings_layernorm.bias", "[64]"),
        ("h.1.self_attention.query_key_value.bias", "[192]"),
        ("h.2.mlp.dense_4h_to_h.weight", "[64, 256]"),
    ],
)
def test_a_tensor_that_is_missing(name: str, shape: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "bloom")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"transformer.{name}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    assert f"transformer.{name} of shape {shape} is missing" in str(error.value)


def test_residuals_of_norms_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "bloom") / "config.json"
    change = {"apply_residual_connection_post_layernorm": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match="apply_residual_connection_post_layernorm is true; supported: false"):
        ModelConfig.from_folder(tmp_path)
