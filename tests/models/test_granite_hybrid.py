"""Granite 4 hybrid: Mamba-2 beside attention, with experts and without, with rotation and without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.granitemoehybrid import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from quire.errors import CheckpointError
from quire.kernels import reference
from quire.model_config import ModelConfig
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.models.test_qwen3_next import edit, parsed
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("granite-hybrid", {"mamba_n_groups": 2, "mamba_d_conv": 2}),
        ("granite-hybrid", {"mamba_n_heads": 2, "mamba_conv_bias": False, "mamba_proj_bias": True}),
        ("granite-hybrid", {"position_embedding_type": "rope", "attention_bias": True, "num_key_value_heads": 1}),
        ("granite-hybrid", {"time_step_limit": [0.3, 0.9], "mamba_expand": 1, "tie_word_embeddings": True}),
        ("granite-hybrid-dense", {"hidden_act": "gelu", "position_embedding_type": "nope"}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "granite-hybrid"), kernels=reference, block_size=8)


def test_one_token_at_a_time(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "granite-hybrid-dense")
    ids = prompt(12)
    model = PagedModel(folder)
    assert_close(torch.cat([model.step({0: [token]})[0] for token in ids]), expected_logits(folder, ids))


def test_old_names_of_the_kinds_of_layers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "granite-hybrid")
    expected = ModelConfig.from_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    config["layers_block_type"] = ["mamba", "mamba", "attention", "mamba"]
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelConfig.from_folder(folder) == expected


def test_parameters_are_those_of_transformers() -> None:
    """Granite 4.0 H Tiny's shape."""
    config = GraniteMoeHybridConfig(
        vocab_size=100352,
        hidden_size=1536,
        intermediate_size=512,
        num_hidden_layers=40,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=64,
        num_experts_per_tok=6,
        shared_intermediate_size=1024,
        mamba_n_heads=48,
        mamba_d_state=128,
        layer_types=["full_attention" if layer in (5, 15, 25, 35) else "linear_attention" for layer in range(40)],
    )
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in GraniteMoeHybridForCausalLM(config).parameters())
    spec = parsed(config).spec
    assert spec.num_parameters == expected
    # 36 layers: 3 older inputs of 3072 + 2 * 128 channels, and 48 matrices of 128 * 64.
    assert spec.state_bytes == 36 * 4 * (3 * (3072 + 256) + 48 * 128 * 64)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mamba_n_heads", 7, "mamba_n_heads is 7; supported: a divisor of mamba_expand times hidden_size, 128"),
        ("mamba_d_head", 5, "mamba_d_head is 5; supported: mamba_expand times hidden_size over mamba_n_heads, 16"),
        ("mamba_n_groups", 3, "mamba_n_heads is 8; supported: a multiple of mamba_n_groups 3"),
        ("time_step_limit", [1], r"time_step_limit is \[1\]; supported: two numbers"),
        ("time_step_limit", [2, 1], r"time_step_limit is \[2, 1\]; supported: two numbers, the smaller one first"),
        ("layer_types", ["linear_attention"] * 4, "supported: at least one layer with attention"),
    ],
)
def test_values_that_are_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "granite-hybrid")
    edit(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(folder)
