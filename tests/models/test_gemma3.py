"""What Gemma 3 has that Gemma 2 has not: norms of queries and keys, and a rotary embedding for each kind of layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.models.parity import assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "overrides",
    [
        {"head_dim": 20},
        {"head_dim": 48, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "attention_bias": True},
        {"sliding_window": 7},
        {"sliding_window": 1},
        {"sliding_window": 500},
        {"layer_types": [FULL] * 4},
        {"layer_types": [SLIDING] * 4},
        {"layer_types": None, "num_hidden_layers": 7},
        {"rope_parameters": None},
        {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 100.0}}},
        {"final_logit_softcapping": 5.0},
        {"tie_word_embeddings": False, "hidden_size": 52, "intermediate_size": 101},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gemma3", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gemma3"), kernels=reference, block_size=8)


def test_int8(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gemma3")
    ids = prompt(40)
    found = PagedModel(folder, "int8").step({0: ids})[0]
    assert torch.nn.functional.cosine_similarity(found, expected_logits(folder, ids)).min() > 0.9


def test_old_files_name_two_bases(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gemma3", num_hidden_layers=7, layer_types=None)
    expected = PagedModel(folder).step({0: prompt(40)})[0]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["layer_types"], config["_sliding_window_pattern"]
    old = {"rope_theta": 5000, "rope_local_base_freq": 300, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    path.write_text(json.dumps({**config, **old}))
    assert torch.equal(PagedModel(folder).step({0: prompt(40)})[0], expected)
    assert_equals_transformers(folder)


def with_a_vision_tower(folder: Path) -> Path:
    text = {**FAMILIES["gemma3"][2], "initializer_range": 0.12}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 257, "boi_token_index": 258, "eoi_token_index": 259}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_the_text_model_beside_a_vision_tower(tmp_path: Path) -> None:
    folder = with_a_vision_tower(tmp_path)
    assert_equals_transformers(folder)
    text = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if "language_model" in name]
    size = sum(tensor.numel() for tensor in text)
    assert ModelConfig.from_folder(folder).spec.num_parameters > size
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vision_config": None}))
    config = ModelConfig.from_folder(folder)
    assert (config.vision, config.spec.num_parameters) == (None, size)
    load_model(config, open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_a_norm_of_keys_that_is_missing(tmp_path: Path) -> None:
    folder = with_a_vision_tower(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["language_model.model.layers.2.self_attn.k_norm.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"language_model.model.layers.2.self_attn.k_norm.weight of shape \[32\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
