"""What GPT-NeoX has that Llama has not: one layer for queries, keys and values, a parallel residual with two norms."""

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


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": False},
        {"tie_word_embeddings": True, "layer_norm_eps": 1e-3},
        {"hidden_act": "gelu_fast", **rope(1.0, 5000.0)},
        {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 3, **rope(0.3)},
        {"num_attention_heads": 1, **rope(0.5)},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], parallel: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-neox", use_parallel_residual=parallel, **overrides)
    assert_equals_transformers(folder)


@pytest.mark.parametrize("family", ["gpt-neox", "gpt-neox-sequential"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
def test_old_checkpoints(head: str, tmp_path: Path) -> None:
    """They store masks and frequencies, spell rotation their own way, and the head has two names."""
    folder = make_checkpoint(tmp_path, "gpt-neox", **rope(0.5, 5000.0))
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    # transformers reads neither of the last two.
    others = {"rope_theta": 2.0, "partial_rotary_factor": 1.0}
    path.write_text(json.dumps({**config, "rotary_pct": 0.5, "rotary_emb_base": 5000, **others}))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{head}.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.1.attention.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    tensors["gpt_neox.layers.1.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, file)
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


def test_the_share_that_is_rotated_by_default(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-neox")
    expected = ModelConfig.from_folder(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("rope_parameters")["partial_rotary_factor"] == 0.25
    path.write_text(json.dumps(config))
    assert ModelConfig.from_folder(folder) == expected


@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_a_fused_layer_of_the_wrong_shape(suffix: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-neox")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"gpt_neox.layers.2.attention.query_key_value.{suffix}"
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[191.*, expected \[192.* by config.json"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu6"}, 'hidden_act is "relu6"; supported: silu'),
        ({"num_attention_heads": 5}, "hidden_size is 64; supported: a multiple of num_attention_heads 5"),
        (
            rope(0.35),
            "rope_parameters.partial_rotary_factor is 0.35; supported: .* even number of a head's 16 elements",
        ),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            'rope_parameters.rope_type is "proportional"; supported: default, linear',
        ),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gpt-neox") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
