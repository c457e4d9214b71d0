"""The config.json files of published models: parameters as transformers counts them, and plans of unknown families."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quire.errors import CheckpointError
from quire.kv_groups import KVLayout
from quire.model_config import ModelConfig

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "configs" / "published.json").read_text()
)

UNKNOWN: dict[str, tuple[dict[str, Any], float]] = {
    # Sizes as published, and billions of parameters as their model cards say.
    "gpt-oss-20b": (
        {
            "architectures": ["FutureOssForCausalLM"],
            "vocab_size": 201088,
            "hidden_size": 2880,
            "head_dim": 64,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 131072,
        },
        20.9,
    ),
    "dbrx": (
        {
            "architectures": ["FutureDbrxForCausalLM"],
            "vocab_size": 100352,
            "d_model": 6144,
            "n_layers": 40,
            "n_heads": 48,
            "num_key_value_heads": 8,
            "ffn_hidden_size": 10752,
            "max_seq_len": 32768,
            "moe_num_experts": 16,
            "moe_topk": 4,
        },
        132,
    ),
    "a model that sees": (
        {
            "architectures": ["FutureVisionForConditionalGeneration"],
            "text_config": {
                "vocab_size": 32064,
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "max_position_embeddings": 4096,
            },
        },
        6.7,
    ),
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = write(tmp_path, PUBLISHED[name]) / "config.json"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert ModelConfig.from_folder(tmp_path).spec.num_parameters == expected


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("gemma-3-1b-pt", 5.9),
        ("gpt-oss-20b", 1.99),
        ("Mistral-7B-v0.1", 7.9),
        ("Llama-3.2-1B", 1.0),
        ("DeepSeek-V2-Lite", 8.88),
        ("DeepSeek-V3", 71.1),
    ],
)
def test_kv_of_a_long_context_beside_one_group_with_keys_and_values(name: str, times: float, tmp_path: Path) -> None:
    """Of a sequence of 32,768 tokens: windows give blocks back, latent attention keeps one row for all heads."""
    config = ModelConfig.from_folder(write(tmp_path, PUBLISHED[name]))
    latent, context, layout = config.latent, 32_768, KVLayout.of(config.spec)
    dims = 2 * config.head_dim if latent is None else latent.head_dim + latent.value_dim
    num_heads = config.num_kv_heads if latent is None else config.num_heads
    expanded = config.num_layers * num_heads * dims * 2 * context
    kept = layout.most_blocks(context, 16) * layout.block_bytes(16, "bfloat16")
    assert times <= expanded / kept < 1.02 * times


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_families_are_estimated(name: str, tmp_path: Path) -> None:
    config, billions = UNKNOWN[name]
    estimate = ModelConfig.estimated(write(tmp_path, config))
    assert estimate.spec.num_parameters / 1e9 == pytest.approx(billions, rel=0.03)
    assert estimate.architecture == config["architectures"][0]


def test_of_sizes_for_each_layer_the_largest_counts(tmp_path: Path) -> None:
    config, _ = UNKNOWN["gpt-oss-20b"]
    expected = ModelConfig.estimated(write(tmp_path, config))
    sizes = [2880, 1024] * 12
    assert ModelConfig.estimated(write(tmp_path, config | {"intermediate_size": sizes})) == expected
    for bad in ([], [2880, "x"], [2880, 0], [True]):
        with pytest.raises(CheckpointError, match="intermediate_size is "):
            ModelConfig.estimated(write(tmp_path, config | {"intermediate_size": bad}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, r"config\.json: hidden_size is missing; supported: an integer up to 2147483648"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; supported: an integer up to 4096"),
        ({"num_attention_heads": "8"}, 'num_attention_heads is "8"; supported: an integer'),
    ],
)
def test_estimates_need_sizes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, _ = UNKNOWN["gpt-oss-20b"]
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.estimated(write(tmp_path, config | change))
