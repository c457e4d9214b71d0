"""Phi-3.5-MoE: sparse-mixer routing, LayerNorms, biases of attention and of the head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.layers.rotary import cos_sin_table
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers, prompt
from tests.models.test_qwen_moe import fuse
from tests.paged_model import PagedModel

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 240,
    "short_factor": [1.0 + 0.1 * index for index in range(16)],
    "long_factor": [1.0 + index for index in range(16)],
    "short_mscale": 1.25,
    "long_mscale": 1.5,
}


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": False, "lm_head_bias": False, "num_key_value_heads": 1, "head_dim": 20},
        {"tie_word_embeddings": True, "router_jitter_noise": 0.01},
        {"sliding_window": 7, "num_key_value_heads": 4},
        {"hidden_size": 60, "num_local_experts": 2, "hidden_act": "gelu", "rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "phimoe", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "phimoe"), kernels=reference, block_size=8)


def test_names_in_memory_and_in_published_checkpoints(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "phimoe")
    ids = prompt(20)
    expected = PagedModel(folder).step({0: ids})[0]
    file = folder / "model.safetensors"
    published = load_file(file)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in published
    fuse(folder)
    names = {name: name.replace("block_sparse_moe.gate", "mlp.router") for name in load_file(file)}
    held = {
        new: tensor
        for name, new in names.items()
        if "block_sparse_moe" not in new
        for tensor in [load_file(file)[name]]
    }
    save_file(held, file)
    assert torch.equal(PagedModel(folder).step({0: ids})[0], expected)


def test_short_contexts_match_transformers(tmp_path: Path) -> None:
    """Beyond the training length Quire rotates by the long factors, as the model was trained; transformers does not."""
    folder = make_checkpoint(tmp_path, "phimoe", max_position_embeddings=512, rope_parameters=LONGROPE)
    assert_equals_transformers(folder, max_model_len=240)


def test_mscales_of_short_and_of_long_contexts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "phimoe", max_position_embeddings=512, rope_parameters=LONGROPE)
    rope = ModelConfig.from_folder(folder).rope
    assert rope is not None
    for num_positions, mscale in ((240, 1.25), (241, 1.5)):
        cosines = cos_sin_table(rope, 32, num_positions)[0, :16]
        assert cosines.tolist() == [mscale] * 16


def test_a_bias_that_is_missing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "phimoe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.post_attention_layernorm.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model.layers.1.post_attention_layernorm.bias of shape \[64\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 3; supported: 2"),
        ({"router_jitter_noise": -1}, "router_jitter_noise is -1; supported: a positive number"),
        (
            {"rope_parameters": {**LONGROPE, "short_mscale": None}},
            "rope_parameters.short_mscale is missing; supported: a positive number",
        ),
        ({"rope_parameters": {"rope_type": "spiral"}}, 'rope_parameters.rope_type is "spiral"; supported: default'),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "phimoe") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
