"""Falcon's three kinds of layers, and the options that make each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.falcon import modeling_falcon

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("falcon", {"hidden_size": 60, "num_attention_heads": 6, "ffn_hidden_size": 101, "activation": "gelu_new"}),
        ("falcon", {"bias": True, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
        ("falcon", {"multi_query": False}),
        ("falcon", {"parallel_attn": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("falcon", {"alibi": True}),
        ("falcon-new", {"num_ln_in_parallel_attn": 1}),
        ("falcon-new", {"num_kv_heads": 1, "bias": True}),
        ("falcon-new", {"num_kv_heads": 4}),
        ("falcon-new", {"num_kv_heads": 3, "num_attention_heads": 6, "hidden_size": 60}),
        ("falcon-new", {"alibi": True}),
        ("falcon-rw", {"num_attention_heads": 6, "hidden_size": 60}),
        ("falcon-rw", {"bias": False, "num_attention_heads": 1}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", ["falcon", "falcon-new", "falcon-rw"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


def test_biases_of_scores_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes the bias of each key in bfloat16, which has no odd number above 256. With the products as
    they are, its logits are Quire's, for slopes that are no powers of 2 and positions of any size."""
    folder = make_checkpoint(tmp_path, "falcon-rw", num_attention_heads=12, hidden_size=72, max_position_embeddings=512)
    ids = prompt(400)
    model = PagedModel(folder)
    found = torch.cat([model.step({0: piece})[0] for piece in (ids[:300], ids[300:301], ids[301:])])

    def exact(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        slopes = _get_alibi_slopes(num_heads, mask.device).bfloat16().float()
        return (slopes[:, None, None] * torch.arange(mask.shape[1])).to(dtype)

    rounded = expected_logits(folder, ids)
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", exact)
    assert_close(found, expected_logits(folder, ids))
    assert 0 < (found - rounded).abs().mean() < 0.05 * rounded.std()


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("falcon", "input_layernorm.bias", "[64]"),
        ("falcon", "self_attention.query_key_value.weight", "[96, 64]"),
        ("falcon-new", "ln_mlp.weight", "[64]"),
        ("falcon-rw", "post_attention_layernorm.weight", "[64]"),
        ("falcon-rw", "mlp.dense_h_to_4h.bias", "[256]"),
    ],
)
def test_a_tensor_that_is_missing(family: str, name: str, shape: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"transformer.h.1.{name}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    assert f"transformer.h.1.{name} of shape {shape} is missing" in str(error.value)


def test_keys_and_values_of_another_number_of_heads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "falcon")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "multi_query": False}))
    with pytest.raises(CheckpointError, match=r"query_key_value.weight has shape \[96, 64\], expected \[192, 64\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
