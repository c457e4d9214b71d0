"""What SmolLM3 has that Llama has not: layers that rotate nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.kernels import reference
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"no_rope_layers": [0, 0, 1]},
        {"no_rope_layers": [0, 0, 0]},
        {"no_rope_layers": [1, 1, 1]},
        {"no_rope_layers": None, "no_rope_layer_interval": 1},
        {"use_sliding_window": True, "sliding_window": 7},
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 3},
        {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        {"tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "smollm3", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "smollm3"), kernels=reference, block_size=8)


def test_int8(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "smollm3")
    ids = prompt(40)
    found = PagedModel(folder, "int8").step({0: ids})[0]
    assert torch.nn.functional.cosine_similarity(found, expected_logits(folder, ids)).min() > 0.9
