"""Families with ALiBi: their slopes, and what their config.json says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from quire.errors import CheckpointError
from quire.model_config import ModelConfig
from quire.model_config.alibi import alibi_slopes
from tests.model_config.test_families import write


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12, 16, 25, 32, 71, 112, 128])
def test_slopes_of_alibi(num_heads: int) -> None:
    bloom = _get_alibi_slopes(num_heads, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads)), bloom, rtol=2e-6, atol=0)


def test_bloom_is_read_as_published(tmp_path: Path) -> None:
    write(tmp_path, "bloom-560m")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.context_length, config.rope, config.spec.positions) == (2048, None, None)
    assert (config.activation, config.embedding_norm, config.tie_word_embeddings) == ("gelu_tanh", True, True)
    assert config.alibi_slopes[:2] == (2**-0.5, 0.5)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    published = {"n_embed": values.pop("hidden_size"), "num_attention_heads": values.pop("n_head"), "n_inner": None}
    path.write_text(json.dumps(values | published))
    assert ModelConfig.from_folder(tmp_path) == config
    path.write_text(json.dumps({**values, "num_attention_heads": 16}))
    with pytest.raises(CheckpointError, match="hidden_size is missing; supported: an integer of at least 1"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "kv_heads", "parallel", "two_norms", "biases", "alibi"),
    [
        ("falcon-7b", 1, True, False, False, False),
        ("falcon-40b", 8, True, True, False, False),
        ("falcon-11b", 8, True, False, False, False),
        ("falcon-rw-1b", 32, False, False, True, True),
    ],
)
def test_falcon_is_read(
    name: str, kv_heads: int, parallel: bool, two_norms: bool, biases: bool, alibi: bool, tmp_path: Path
) -> None:
    write(tmp_path, name)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_kv_heads, config.parallel_residual, config.parallel_mlp_norm) == (kv_heads, parallel, two_norms)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (biases,) * 3
    assert (bool(config.alibi_slopes), config.rope is None) == (alibi, alibi)
    # 2 ** -0.25 in bfloat16, and its eighth, since a head has 64 elements.
    assert not alibi or config.alibi_slopes[0] == 0.83984375 / 8


def test_falcon_s_number_of_norms(tmp_path: Path) -> None:
    write(tmp_path, "falcon-40b")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_ln_in_parallel_attn": 3}))
    with pytest.raises(CheckpointError, match="num_ln_in_parallel_attn is 3; supported: 1 or 2"):
        ModelConfig.from_folder(tmp_path)


def test_mpt_is_read(tmp_path: Path) -> None:
    write(tmp_path, "mpt-7b-storywriter")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.norm, config.norm_bias, config.qkv_bias, config.mlp_bias) == ("layer_norm", False, False, False)
    assert (config.context_length, config.clip_qkv, config.activation) == (65536, 6.0, "gelu")
    assert config.alibi_slopes[:2] == (2**-0.5, 2**-1)
    # Published files name the class of their own code, and leave most keys out.
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    kept = ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len", "attn_config", "learned_pos_emb")
    path.write_text(json.dumps({key: values[key] for key in kept} | {"architectures": ["MPTForCausalLM"]}))
    assert ModelConfig.from_folder(tmp_path) == replace(
        config, architecture="MPTForCausalLM", checkpoint_dtype=ModelConfig.from_folder(tmp_path).checkpoint_dtype
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_bias": False}, "no_bias is false; supported: true"),
        ({"expansion_ratio": 3}, "expansion_ratio is 3; supported: 4"),
        ({"logit_scale": "inv_sqrt_d_model"}, 'logit_scale is "inv_sqrt_d_model"; supported: null'),
        ({"attn_config": {"alibi": False}}, "attn_config.alibi is false; supported: true"),
        ({"attn_config": {"qk_ln": True}}, "attn_config.qk_ln is true; supported: false"),
        ({"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm is true; supported: false"),
        ({"attn_config": {"softmax_scale": 0.1}}, "attn_config.softmax_scale is 0.1; supported: null"),
        (
            {"attn_config": {"attn_type": "multiquery_attention"}},
            'attn_config.attn_type is "multiquery_attention"; supported: "multihead_attention"',
        ),
        ({"attn_config": {"clip_qkv": -1}}, "attn_config.clip_qkv is -1; supported: a positive number"),
    ],
    ids=str,
)
def test_options_of_mpt_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "mpt-7b")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
