"""What GPT-BigCode has that GPT-2 has not: one KV head for all queries, and rows by head where each has its own."""

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
        {"multi_query": False},
        {"multi_query": False, "n_embd": 60, "n_head": 3, "n_inner": 101},
        {"n_embd": 60, "n_head": 5, "activation_function": "gelu", "tie_word_embeddings": False},
        {"n_head": 1, "layer_norm_epsilon": 1e-3},
        {"attention_softmax_in_fp32": False, "scale_attention_softmax_in_fp32": False},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gpt-bigcode", **overrides))


@pytest.mark.parametrize("multi_query", [True, False])
def test_reference_kernels_compute_the_same(multi_query: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-bigcode", multi_query=multi_query)
    assert_equals_transformers(folder, kernels=reference, block_size=8)


def test_keys_and_values_of_another_number_of_heads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-bigcode")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "multi_query": False}))
    with pytest.raises(CheckpointError, match=r"h.0.attn.c_attn.weight has shape \[96, 64\], expected \[192, 64\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_a_table_of_positions_that_is_missing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-bigcode")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.wpe.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"transformer.wpe.weight of shape \[256, 64\] is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize("change", [{"scale_attn_weights": False}, {"add_cross_attention": True}], ids=str)
def test_options_that_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gpt-bigcode") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    ((key, value),) = change.items()
    with pytest.raises(CheckpointError, match=f"{key} is {json.dumps(value)}; supported: {json.dumps(not value)}"):
        ModelConfig.from_folder(tmp_path)
