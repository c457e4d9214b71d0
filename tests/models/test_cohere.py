"""What Cohere has that Llama has not: one LayerNorm for both halves of a layer, rotation of adjacent pairs, a factor of
the logits, norms for each head; and layers without window that rotate nothing."""

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

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("cohere", {"num_key_value_heads": 1, "logit_scale": 1.0}),
        ("cohere", {"num_key_value_heads": 4, "attention_bias": True}),
        ("cohere", {"tie_word_embeddings": False, "layer_norm_eps": 1e-3}),
        ("cohere", {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 5, "num_key_value_heads": 5}),
        ("cohere", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("cohere-qk-norm", {"num_key_value_heads": 1, "attention_bias": True}),
        ("cohere-qk-norm", {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3}),
        ("cohere2", {"sliding_window": 7}),
        ("cohere2", {"sliding_window": 1}),
        ("cohere2", {"sliding_window": 500}),
        ("cohere2", {"layer_types": [FULL] * 3}),
        ("cohere2", {"layer_types": [SLIDING] * 3}),
        ("cohere2", {"layer_types": None, "num_hidden_layers": 5}),
        ("cohere2", {"attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": False}),
        ("cohere2", {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", ["cohere-qk-norm", "cohere2"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


@pytest.mark.parametrize("family", ["cohere-qk-norm", "cohere2"])
def test_int8(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    ids = prompt(40)
    found = PagedModel(folder, "int8").step({0: ids})[0]
    assert torch.nn.functional.cosine_similarity(found, expected_logits(folder, ids)).min() > 0.9


def test_a_norm_of_one_head_for_all(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "cohere-qk-norm")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.1.self_attn.q_norm.weight": torch.ones(16)}, file)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.q_norm.weight has shape \[16\], expected \[4, 16\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
