"""Qwen3-Next and Qwen3.5: gated delta nets beside gated attention, in all ways of storing them."""

import json
import tempfile
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
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel

KINDS = ["linear_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3-next", {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 2}),
        ("qwen3-next", {"linear_num_key_heads": 1, "linear_key_head_dim": 20, "norm_topk_prob": False}),
        ("qwen3-next", {"mlp_only_layers": [1], "layer_types": [*KINDS, *KINDS], "attention_bias": True}),
        ("qwen3-next", {"num_experts": 0, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("qwen3-next", {"layer_types": ["full_attention"] * 4, "hidden_size": 60}),
        ("qwen3.5", {"linear_value_head_dim": 9, "linear_num_value_heads": 6, "linear_num_key_heads": 3}),
        ("qwen3.5", {"layer_types": [*reversed(KINDS), *reversed(KINDS)], "num_key_value_heads": 1}),
        ("qwen3.5-moe", {"num_experts_per_tok": 3, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", ["qwen3-next", "qwen3.5"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


def test_one_token_at_a_time_in_company(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3-next")
    ids, others = prompt(12), prompt(90, seed=2)
    model = PagedModel(folder)
    found = [model.step({1: others[7 * place : 7 * place + 7], 0: [token]})[0] for place, token in enumerate(ids)]
    assert_close(torch.cat(found), expected_logits(folder, ids))


@pytest.mark.parametrize("layers", [["full_attention", "linear_attention"], ["linear_attention", "full_attention"]])
def test_the_last_layer_computes_the_tokens_that_are_read(layers: list[str], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3.5", num_hidden_layers=2, layer_types=layers)
    tokens, read = {0: prompt(20), 1: prompt(7, seed=2)}, {0: 1, 1: 3}
    found, whole = PagedModel(folder).step(tokens, read), PagedModel(folder).step(tokens)
    for sequence, count in read.items():
        assert_close(found[sequence], whole[sequence][-count:])


def test_the_interval_of_attention(tmp_path: Path) -> None:
    """Without types of layers every fourth has attention, or every `full_attention_interval`-th."""
    folder = make_checkpoint(tmp_path, "qwen3.5")
    for interval, expected in ((None, {0, 1, 2}), (2, {0, 2}), (1, None)):
        edit(folder / "config.json", layer_types=None, full_attention_interval=interval)
        recurrent = ModelConfig.from_folder(folder).recurrent
        assert (None if recurrent is None else recurrent.layers) == expected


def test_the_text_model_of_a_published_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3.5")
    ids = prompt(20)
    expected = PagedModel(folder).step({0: ids})[0]
    file, path = folder / "model.safetensors", folder / "config.json"
    tensors = {name.replace("model.", "model.language_model.", 1): each for name, each in load_file(file).items()}
    tensors |= {"model.visual.patch_embed.proj.weight": torch.ones(3), "mtp.fc.weight": torch.ones(3)}
    save_file(tensors, file)
    text = json.loads(path.read_text())
    del text["architectures"]
    name = "Qwen3_5ForConditionalGeneration"
    path.write_text(json.dumps({"architectures": [name], "text_config": text, "eos_token_id": 258}))
    assert torch.equal(PagedModel(folder).step({0: ids})[0], expected)


@pytest.mark.parametrize("family", ["qwen3-next", "qwen3.5-moe"])
def test_parameters_are_those_of_transformers(family: str) -> None:
    """The published sizes: Qwen3-Next-80B-A3B and Qwen3.5-35B-A3B, whose configs are the defaults."""
    config_class, model_class, _ = FAMILIES[family]
    config = config_class()
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert parsed(config).spec.num_parameters == expected


def parsed(config: Any) -> ModelConfig:
    """A config of transformers as Quire reads it."""
    with tempfile.TemporaryDirectory() as folder:
        name = type(config).__name__.replace("Text", "").replace("Config", "ForCausalLM")
        config.architectures = [name]
        config.save_pretrained(folder)
        return ModelConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer_types", ["linear_attention"] * 4, "layer_types is .*; supported: at least one layer with attention"),
        ("layer_types", ["full_attention"], "layer_types is .*; supported: 4 times one of linear_attention"),
        ("layer_types", ["sliding_attention"] * 4, "layer_types is .*; supported: 4 times one of linear_attention"),
        ("linear_num_value_heads", 3, "linear_num_value_heads is 3; supported: a multiple of linear_num_key_heads 2"),
        ("linear_key_head_dim", 0, "linear_key_head_dim is 0; supported: an integer of at least 1"),
        ("linear_conv_kernel_dim", 1, "linear_conv_kernel_dim is 1; supported: an integer of at least 2"),
    ],
)
def test_values_that_are_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3-next")
    edit(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("name", ["A_log", "dt_bias", "conv1d.weight", "in_proj_ba.weight", "norm.weight"])
def test_tensors_that_are_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3-next")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.linear_attn.{name}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"tensor model.layers.1.linear_attn.{name} of shape"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
