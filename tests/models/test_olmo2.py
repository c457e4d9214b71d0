"""What OLMo 2 has that Llama has not: norms after each half of a layer and none before, and norms over all heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM
from quire.errors import CheckpointError, ConfigError
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
        {"head_dim": 20, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"attention_bias": True, "rms_norm_eps": 1e-3},
        {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 5, "num_key_value_heads": 5},
        {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        },
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "olmo2", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "olmo2"), kernels=reference, block_size=8)


def test_int8(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "olmo2")
    ids = prompt(40)
    found = PagedModel(folder, "int8").step({0: ids})[0]
    assert torch.nn.functional.cosine_similarity(found, expected_logits(folder, ids)).min() > 0.9


def test_a_norm_of_another_width(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "olmo2")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.1.self_attn.k_norm.weight": torch.ones(32)}, file)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_norm.weight has shape \[32\], expected \[64\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_a_float8_cache_needs_the_checkpoints_own_scales(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "olmo2")
    options: dict[str, Any] = {"attention_backend": "sdpa", "kv_cache_dtype": "fp8", "num_blocks": 20, "threads": 1}
    with pytest.raises(ConfigError, match=r"kv_cache_dtype fp8 needs scales: .* no norm bounds, .* use another"):
        LLM(str(folder), **options)
    file = folder / "model.safetensors"
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("k_scale", "v_scale")]
    save_file({**load_file(file), **{name: torch.ones(1) for name in names}}, file)
    assert LLM(str(folder), **options).generate([[1, 2]])
