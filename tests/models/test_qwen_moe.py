"""Qwen2-MoE and Qwen3-MoE: a shared expert with a gate, dense layers between sparse ones, and both ways of storing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.layer_spec import ExpertsSpec
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint, reference_model
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2-moe", {"norm_topk_prob": True}),
        ("qwen2-moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("qwen2-moe", {"mlp_only_layers": [2, 7]}),
        ("qwen2-moe", {"num_experts": 5, "num_experts_per_tok": 5, "qkv_bias": False, "tie_word_embeddings": True}),
        ("qwen2-moe", {"num_key_value_heads": 1, "head_dim": 20, "moe_intermediate_size": 36, "hidden_act": "gelu"}),
        ("qwen2-moe", {"hidden_size": 60, "shared_expert_intermediate_size": 37, "num_key_value_heads": 4}),
        ("qwen2-moe", {"use_sliding_window": True, "sliding_window": 7}),
        ("qwen2-moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("qwen3-moe", {"norm_topk_prob": False, "mlp_only_layers": [], "tie_word_embeddings": True}),
        ("qwen3-moe", {"num_experts": 5, "num_experts_per_tok": 3, "decoder_sparse_step": 3}),
        ("qwen3-moe", {"num_key_value_heads": 1, "head_dim": 20, "attention_bias": True, "hidden_act": "gelu"}),
        ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe"])
def test_one_token(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    ids = prompt(12)
    model = PagedModel(folder)
    assert_close(torch.cat([model.step({0: [token]})[0] for token in ids]), expected_logits(folder, ids))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe"])
def test_experts_in_one_tensor(family: str, dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    ids = prompt(20)
    expected = PagedModel(folder, dtype).step({0: ids})[0]
    fuse(folder)
    assert torch.equal(PagedModel(folder, dtype).step({0: ids})[0], expected)


def fuse(folder: Path) -> None:
    """Store the experts of every layer as transformers 5 holds them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer, block in reference_model(folder).model.named_modules():
        if layer.endswith(".experts"):
            prefix = f"model.{layer}."
            for name in [name for name in tensors if name.startswith(prefix)]:
                del tensors[name]
            tensors |= {prefix + name: value.detach().clone() for name, value in block.named_parameters()}
    save_file(tensors, file)


def test_old_files_leave_the_types_of_layers_unsaid(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2-moe", use_sliding_window=True, sliding_window=7, max_window_layers=2)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("layer_types") == ["sliding_attention", "full_attention", "full_attention"]
    path.write_text(json.dumps(config))
    assert ModelConfig.from_folder(folder).layer_windows == (7, 0, 0)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_both_spellings_of_the_number_of_experts(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3-moe")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("num_local_experts") == 6
    path.write_text(json.dumps({**config, name: 6}))
    assert ModelConfig.from_folder(folder).num_experts == 6
    path.write_text(json.dumps({**config, name: 0}))
    assert not ModelConfig.from_folder(folder).has_experts(2)


def test_dense_and_sparse_layers_are_counted(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2-moe", mlp_only_layers=[1])
    spec = ModelConfig.from_folder(folder).spec
    assert [layer.experts is None for layer in spec.layers] == [False, True, False]
    experts = spec.layers[0].mlp
    assert isinstance(experts, ExpertsSpec)
    assert [linear.num_outputs for linear in experts.always_read] == [7, 160, 64]
    inactive = 2 * 4 * 3 * 48 * 64  # in two layers, four of six experts
    assert spec.num_parameters - spec.num_active_parameters == inactive
    assert spec.num_parameters == reference_model(folder).num_parameters()


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["shared_expert_gate", "shared_expert.up_proj", "experts.0.gate_proj", "experts.3.down_proj", "gate"]
)
def test_tensors_that_are_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2-moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.{name}.weight"]
    save_file(tensors, file)
    assert f"tensor model.layers.1.mlp.{name}.weight of shape" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; supported: at most the number of experts 6"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; supported: an integer of at least 1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1; supported: a list of indices of layers"),
        ({"mlp_only_layers": ["1"]}, 'mlp_only_layers is ["1"]; supported: a list of indices of layers'),
        ({"shared_expert_intermediate_size": 81}, "has shape [80, 64], expected [81, 64] by config.json"),
        ({"moe_intermediate_size": 49}, "has shape [48, 64], expected [49, 64] by config.json"),
        ({"mlp_only_layers": []}, "tensor model.layers.0.mlp.gate.weight of shape [6, 64] is missing"),
        ({"mlp_only_layers": [0, 1]}, "tensor model.layers.1.mlp.gate_proj.weight of shape [112, 64] is missing"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2-moe")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert message in refusal(folder)
