"""What Gemma 2 has that Llama has not: post-norms, an offset in its norms, soft-caps, scaled embeddings."""

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
from tests.models.parity import assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"head_dim": 20},
        {"head_dim": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
        {"sliding_window": 7},
        {"sliding_window": 1},
        {"sliding_window": 500},
        {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"attention_bias": True, "num_key_value_heads": 1},
        # Its square root is no number of few digits.
        {"hidden_size": 52, "intermediate_size": 101},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gemma2", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gemma2"), kernels=reference, block_size=8)


@pytest.mark.parametrize("option", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_the_caps_of_the_test_checkpoints_bend(option: str, tmp_path: Path) -> None:
    ids = prompt(40)
    capped = expected_logits(make_checkpoint(tmp_path / "capped", "gemma2"), ids)
    assert (capped - expected_logits(make_checkpoint(tmp_path / "not", "gemma2", **{option: None}), ids)).norm() > 1


def test_embeddings_are_scaled_by_a_factor_of_the_checkpoints_dtype(tmp_path: Path) -> None:
    """As transformers does in the checkpoint's own dtype: sqrt(52) is 7.2111, in bfloat16 7.21875."""
    folder = make_checkpoint(tmp_path, "gemma2", dtype="bfloat16", hidden_size=52)
    model = PagedModel(folder, "bfloat16").model
    assert model.embedding_factor == 7.21875  # type: ignore[attr-defined]


def test_old_files_leave_the_types_of_layers_unsaid(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gemma2", num_hidden_layers=4)
    ids = prompt(40)
    expected = PagedModel(folder).step({0: ids})[0]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("layer_types") == ["sliding_attention", "full_attention"] * 2
    config["hidden_act"] = "gelu"  # written beside hidden_activation, and ignored by transformers
    path.write_text(json.dumps({**config, "cache_implementation": "hybrid"}))
    assert torch.equal(PagedModel(folder).step({0: ids})[0], expected)


@pytest.mark.parametrize("name", ["post_attention_layernorm", "post_feedforward_layernorm"])
def test_a_post_norm_that_is_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gemma2")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.2.{name}.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"model.layers.2.{name}.weight of shape \[64\] is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true; supported: false"),
        ({"attn_logit_softcapping": -1}, "attn_logit_softcapping is -1; supported: a positive number"),
        ({"query_pre_attn_scalar": "x"}, 'query_pre_attn_scalar is "x"; supported: a positive number'),
        ({"layer_types": ["full_attention"]}, r"layer_types is \[\"full_attention\"\]; supported: 3 times one of"),
        ({"hidden_activation": "hard_swish"}, 'hidden_activation is "hard_swish"; supported: silu'),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gemma2") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
