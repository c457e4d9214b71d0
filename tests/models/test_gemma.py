"""What Gemma has that Llama has not: an offset in its norms, scaled embeddings, and an activation it spells wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.errors import CheckpointError
from quire.kernels import reference
from quire.model_config import ModelConfig
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"head_dim": 20},
        {"head_dim": 48, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "attention_bias": True},
        # Its square root is no number of few digits.
        {"hidden_size": 52, "intermediate_size": 101},
        {"tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gemma", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gemma"), kernels=reference, block_size=8)


def test_gelu_means_its_approximation(tmp_path: Path) -> None:
    """As published: hidden_act is gelu, and hidden_activation beside it is not read."""
    folder = make_checkpoint(tmp_path, "gemma")
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "hidden_act": "gelu", "hidden_activation": None}
    path.write_text(json.dumps(config))
    assert ModelConfig.from_folder(folder).activation == "gelu_tanh"
    assert_equals_transformers(folder)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_other_weights(dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gemma", dtype="bfloat16")
    ids = prompt(40)
    found = PagedModel(folder, dtype).step({0: ids})[0]
    expected = expected_logits(folder, ids)
    assert_close(found, expected, 0.3 * expected.abs().max().item())
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true; supported: false"),
        ({"hidden_act": "relu6"}, 'hidden_act is "relu6"; supported: silu'),
        ({"hidden_act": ["gelu"]}, r'hidden_act is \["gelu"\]; supported: silu'),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gemma") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
