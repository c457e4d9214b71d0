"""What EXAONE 4 has that Llama has not: norms after both halves alone, and no rotation in layers without windows."""

import json
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
from tests.models.parity import assert_equals_transformers
from tests.paged_model import PagedModel

FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 4}


def change_config(folder: Path, *removed: str, **changes: Any) -> Path:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in removed}))
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 1, "sliding_window": 7},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {**FULL, "tie_word_embeddings": True},
        {"layer_types": ["full_attention"] * 4},
        {"head_dim": 20, "hidden_size": 60, "intermediate_size": 101, "hidden_act": "gelu"},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "exaone4", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "exaone4"), kernels=reference, block_size=8)


def test_which_layers_have_windows_and_rotate(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(make_checkpoint(tmp_path / "windows", "exaone4"))
    assert config.layer_windows == (24, 24, 24, 0)
    assert [config.rope_of(layer) is not None for layer in range(4)] == [True, True, True, False]
    full = ModelConfig.from_folder(make_checkpoint(tmp_path / "full", "exaone4", **FULL))
    assert not any(full.layer_windows)
    assert all(full.rope_of(layer) == full.rope is not None for layer in range(4))


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [("LLLG", (24, 24, 24, 0)), ("LG", (24, 0, 24, 0)), ("L", (24, 24, 24, 0)), (2, (24, 0, 24, 0))],
)
def test_a_pattern_in_letters(pattern: str | int, windows: tuple[int, ...], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "exaone4")
    config = ModelConfig.from_folder(change_config(folder, "layer_types", sliding_window_pattern=pattern))
    assert config.layer_windows == windows


def test_what_the_pattern_says_is_what_the_types_say(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "exaone4")
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    change_config(folder, "layer_types", sliding_window_pattern="LLLG")
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sliding_window_pattern": "LXG"},
            'sliding_window_pattern is "LXG"; supported: a number of layers, or the le',
        ),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0; supported: an integer of at least 1"),
        ({"sliding_window": 0}, "sliding_window is 0; supported: an integer of at least 1"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    change_config(make_checkpoint(tmp_path, "exaone4"), "layer_types", **change)
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["post_feedforward_layernorm", "self_attn.q_norm"])
def test_a_norm_that_is_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "exaone4")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.2.{name}.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"model.layers.2.{name}.weight of shape .* is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_a_float8_cache_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "exaone4")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype fp8 needs scales: .* no norm bounds"):
        LLM(str(folder), attention_backend="sdpa", kv_cache_dtype="fp8", num_blocks=20, threads=1)
