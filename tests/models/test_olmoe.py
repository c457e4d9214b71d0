"""What OLMoE has that Qwen-MoE has not: norms of queries and keys over all heads together."""

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
from tests.models.parity import assert_equals_transformers, prompt
from tests.models.test_qwen_moe import fuse
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 1, "norm_topk_prob": True},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "num_experts_per_tok": 8},
        {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3, "num_experts": 5},
        {"attention_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "olmoe", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "olmoe"), kernels=reference, block_size=8)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "olmoe")
    ids = prompt(20)
    expected = PagedModel(folder).step({0: ids})[0]
    fuse(folder)
    assert torch.equal(PagedModel(folder).step({0: ids})[0], expected)


def test_a_norm_of_one_head_alone(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "olmoe")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.1.self_attn.k_norm.weight": torch.ones(16)}, file)
    with pytest.raises(CheckpointError, match=r"self_attn.k_norm.weight has shape \[16\], expected \[32\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_clipped_queries_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "olmoe") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip_qkv": 8.0}))
    with pytest.raises(CheckpointError, match=r"clip_qkv is 8\.0; supported: false"):
        ModelConfig.from_folder(tmp_path)
