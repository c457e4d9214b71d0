"""What Granite has that Llama has not: factors of embeddings, updates, scores and logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.kernels import reference
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel

FACTORS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


@pytest.mark.parametrize(
    "overrides",
    [
        *({factor: 1.0} for factor in FACTORS),
        dict(zip(FACTORS, (12.0, 0.22, 0.0078125, 16.0), strict=True)),
        {"head_dim": 20, "num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        {"hidden_size": 52, "intermediate_size": 101, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "granite", **overrides))


@pytest.mark.parametrize("factor", FACTORS)
def test_the_factors_of_the_test_checkpoint_matter(factor: str, tmp_path: Path) -> None:
    ids = prompt(20)
    expected = expected_logits(make_checkpoint(tmp_path / "as made", "granite"), ids)
    changed = expected_logits(make_checkpoint(tmp_path / "changed", "granite", **{factor: 1.0}), ids)
    assert (changed - expected).abs().max() > 1e-2


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "granite"), kernels=reference, block_size=8)


def test_factors_are_not_rounded(tmp_path: Path) -> None:
    """transformers multiplies by the number of config.json, whatever the type of the weights."""
    assert_equals_transformers(make_checkpoint(tmp_path, "granite", dtype="bfloat16"))


def test_int8(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "granite")
    ids = prompt(40)
    found = PagedModel(folder, "int8").step({0: ids})[0]
    assert torch.nn.functional.cosine_similarity(found, expected_logits(folder, ids)).min() > 0.9
