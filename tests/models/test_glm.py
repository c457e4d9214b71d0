"""What GLM-4 has that Llama has not: adjacent pairs in half a head, fused gate and up, norms after both halves."""

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
    ("family", "overrides"),
    [
        ("glm", {"attention_bias": False}),
        ("glm", {"num_key_value_heads": 1, "head_dim": 20}),
        ("glm", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("glm4", {"attention_bias": False, "num_key_value_heads": 4}),
        ("glm4", {"num_key_value_heads": 1, "head_dim": 12, "hidden_size": 60, "intermediate_size": 101}),
        ("glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
        ("glm4", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_what_files_leave_unsaid(family: str, tmp_path: Path) -> None:
    """The first files say neither that half of a head is rotated nor in which layout, and rope_theta outside."""
    folder = make_checkpoint(tmp_path, family)
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    path = folder / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("rope_parameters")["partial_rotary_factor"] == 0.5
    assert values.pop("attention_bias")
    assert values.pop("num_key_value_heads") == 2
    path.write_text(json.dumps({**values, "rope_theta": 10000.0}))
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


@pytest.mark.parametrize("name", ["post_self_attn_layernorm", "post_mlp_layernorm"])
def test_a_post_norm_that_is_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "glm4")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.2.{name}.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"model.layers.2.{name}.weight of shape \[64\] is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_the_later_form_under_the_name_of_the_first(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "glm4")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["GlmForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"6 tensors are not part of the model .*post_mlp_layernorm"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": {"partial_rotary_factor": 0.3}},
            "partial_rotary_factor is 0.3; supported: .* even number",
        ),
        ({"hidden_act": "relu6"}, 'hidden_act is "relu6"; supported: silu'),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; supported: a divisor"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "glm4") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
