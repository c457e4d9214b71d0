"""What OPT has that GPT-2 has not: an offset of positions, norms after the additions, projections at both ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError, ConfigError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import Model, load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers
from tests.paged_model import PagedModel


def load(folder: Path) -> Model:
    return load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize("family", ["opt", "opt-350m"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": False},
        {"enable_bias": False, "activation_function": "gelu"},
        {"hidden_size": 60, "ffn_dim": 101, "num_attention_heads": 3},
        {"num_hidden_layers": 1},
        {"_remove_final_layer_norm": True},
        {"do_layer_norm_before": True, "word_embed_proj_dim": 80},
        {"do_layer_norm_before": False, "word_embed_proj_dim": 64},
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", ["opt", "opt-350m"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


@pytest.mark.parametrize("family", ["opt", "opt-350m"])
def test_bare_names_of_the_first_checkpoints(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    table = tensors["decoder.embed_tokens.weight"]
    save_file({**tensors, "decoder.version": torch.tensor([3.0]), "lm_head.weight": table.clone()}, file)
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


def test_old_configs_leave_out_what_is_usual(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "opt")
    expected = ModelConfig.from_folder(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings", "_remove_final_layer_norm"):
        del config[key]
    path.write_text(json.dumps({**config, "word_embed_proj_dim": None}))
    assert ModelConfig.from_folder(folder) == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("project_out.weight", "48, 64"),
        ("embed_positions.weight", "258, 64"),
        ("layers.1.fc2.bias", "64"),
        ("layers.2.final_layer_norm.weight", "64"),
    ],
)
def test_a_tensor_that_is_missing(name: str, shape: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "opt-350m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.decoder.{name}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"tensor model.decoder.{name} of shape \[{shape}\] is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("opt", {"word_embed_proj_dim": 48}, r"embed_tokens.weight has shape \[260, 64\], expected \[260, 48\]"),
        ("opt", {"max_position_embeddings": 258}, r"positions.weight has shape \[258, 64\], expected \[260, 64\]"),
        ("opt-350m", {"word_embed_proj_dim": 64}, r"weight has shape \[260, 48\], expected \[260, 64\] by config.json"),
        ("opt", {"do_layer_norm_before": False}, "2 tensors are not part of the model .*final_layer_norm"),
        ("opt", {"enable_bias": False}, "18 tensors are not part of the model .*bias"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is false; supported: true"),
        ("opt", {"activation_function": "relu6"}, 'activation_function is "relu6"; supported: silu'),
        ("opt", {"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0; supported: an integer of at least 1"),
        ("opt", {"ffn_dim": "x"}, 'ffn_dim is "x"; supported: an integer of at least 1'),
        ("opt", {"num_attention_heads": 3}, "hidden_size is 64; supported: a multiple of num_attention_heads 3"),
    ],
)
def test_options_that_are_refused(family: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, family) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_float8_cache_needs_a_norm_before_attention(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "opt-350m")
    with pytest.raises(
        ConfigError, match="kv_cache_dtype fp8 needs scales: this model's layers read a residual stream that no norm"
    ):
        load(folder).scale_kv()
    file = folder / "model.safetensors"
    scales = {
        f"model.decoder.layers.{index}.self_attn.{part}_scale": torch.ones(1) for index in range(3) for part in "kv"
    }
    save_file({**load_file(file), **scales}, file)
    load(folder).scale_kv()
