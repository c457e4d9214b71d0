"""rope_parameters, rope_scaling and rope_theta in every combination, against transformers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from quire.errors import CheckpointError
from quire.model_config import ModelConfig, RopeConfig
from tests.checkpoints import FAMILIES

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASE = {"rope_type": "default", "rope_theta": 500.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 300.0},
    "parameters": {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
    "parameters without theta": {"rope_parameters": LINEAR},
    "parameters, theta beside": {"rope_parameters": LINEAR, "rope_theta": 300.0},
    "parameters with theta, theta beside": {"rope_parameters": BASE, "rope_theta": 300.0},
    "scaling": {"rope_scaling": LINEAR},
    "scaling, theta beside": {"rope_scaling": LINEAR, "rope_theta": 300.0},
    "old type": {"rope_scaling": {"type": "linear", "factor": 2}},
    "scaling over parameters": {"rope_parameters": BASE, "rope_scaling": YARN},
    "scaling over parameters, theta beside": {"rope_parameters": BASE, "rope_scaling": YARN, "rope_theta": 300.0},
    "scaling with theta over parameters": {"rope_parameters": BASE, "rope_scaling": YARN | {"rope_theta": 77.0}},
    "linear over yarn": {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": LINEAR},
    "empty scaling": {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": {}},
    "null scaling": {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": None},
    "null parameters": {"rope_parameters": None, "rope_scaling": LINEAR},
    "two types": {"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 4.0, "rope_theta": 500.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3, length beside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "yarn, length beside": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "share in the object": {"rope_parameters": BASE | {"partial_rotary_factor": 0.5}},
    "share beside": {"rope_parameters": BASE, "partial_rotary_factor": 0.5},
}
ONE_ROPE = ("llama", "mistral", "qwen2", "stablelm", "phi")


def write(folder: Path, family: str, variant: dict[str, Any]) -> Path:
    config_class, model_class, options = FAMILIES[family]
    config = config_class(**options)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        values.pop(key, None)
    (folder / "config.json").write_text(json.dumps(values | variant))
    return folder


@pytest.mark.parametrize("family", ONE_ROPE)
@pytest.mark.parametrize("name", VARIANTS)
def test_is_read_as_transformers_reads_it(name: str, family: str, tmp_path: Path) -> None:
    folder = write(tmp_path, family, VARIANTS[name])
    settings, found = AutoConfig.from_pretrained(folder), ModelConfig.from_folder(folder).rope
    settings.standardize_rope_params()  # as the model does before it reads them
    expected = settings.rope_parameters
    assert found is not None
    assert (found.rope_type, found.theta) == (expected["rope_type"], expected["rope_theta"])
    if found.rope_type != "default":
        assert found.factor == expected["factor"]
    if found.rope_type in ("yarn", "llama3"):
        assert found.original_max_position == expected["original_max_position_embeddings"]
    # Only these families' models rotate a part of each head.
    share = expected.get("partial_rotary_factor", 1.0) if family in ("stablelm", "phi") else 1.0
    assert found.partial_rotary_factor == share


GEMMA: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 300.0},
    "local": {"rope_theta": 300.0, "rope_local_base_freq": 50.0},
    "scaling": {"rope_scaling": LINEAR, "rope_theta": 300.0},
    "nested": {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 500.0}, "sliding_attention": BASE}},
    "nested full": {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 500.0}}},
    "nested null": {"rope_parameters": {"full_attention": None, "sliding_attention": BASE}},
    "nested and scaling": {
        "rope_parameters": {"full_attention": BASE, "sliding_attention": BASE},
        "rope_scaling": LINEAR,
    },
}


@pytest.mark.parametrize("name", GEMMA)
def test_layers_with_embeddings_of_their_own(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "gemma3", GEMMA[name])
    expected, found = AutoConfig.from_pretrained(folder).rope_parameters, ModelConfig.from_folder(folder)
    for layer, kind in ((2, "full_attention"), (0, "sliding_attention")):
        rope = found.rope_of(layer)
        assert rope is not None
        assert (rope.rope_type, rope.theta) == (expected[kind]["rope_type"], expected[kind]["rope_theta"])
        assert rope.factor == expected[kind].get("factor", 1.0)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_objects_for_types_of_layers_are_read_in_every_family(family: str, key: str, tmp_path: Path) -> None:
    """transformers ignores them in these families, or fails."""
    one = LINEAR | {"rope_theta": 500.0}
    found = ModelConfig.from_folder(write(tmp_path, family, {key: {"full_attention": one, "sliding_attention": one}}))
    assert found.rope == RopeConfig(theta=500.0, rope_type="linear", factor=4.0, original_max_position=256)
    assert found.layer_ropes == ()


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "dynamic", "default"])
def test_factors_of_other_types_have_no_effect(rope_type: str, tmp_path: Path) -> None:
    values = LLAMA3 | {"rope_type": rope_type, "rope_theta": 1e4}
    plain = ModelConfig.from_folder(write(tmp_path, "llama", {"rope_parameters": values}))
    others = values | {"attention_factor": 3.0, "mscale": 2.0, "mscale_all_dim": 5.0}
    assert ModelConfig.from_folder(write(tmp_path, "llama", {"rope_parameters": others})) == plain


def test_a_lost_base_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, "llama", VARIANTS["scaling over parameters"])
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_folder(folder)
    assert "rope_scaling replaces rope_parameters, as in transformers, and with it the base 500.0" in caplog.text


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear"; supported: an object'),
        ({"rope_scaling": 5}, "rope_scaling is 5; supported: an object"),
        ({"rope_parameters": {"full_attention": 5}}, r"rope_parameters\.full_attention is 5; supported: an object"),
        ({"rope_parameters": {"full_attention": {}, "other": {}}}, "supported: an object for each of full_attention"),
        ({"rope_theta": "10"}, r'rope_parameters\.rope_theta is "10"; supported: a positive number'),
        ({"rope_theta": float("nan")}, r"rope_parameters\.rope_theta is NaN; supported: a positive number"),
        ({"rope_theta": float("inf")}, r"rope_parameters\.rope_theta is Infinity; supported: a positive number"),
        (
            {"rope_scaling": LINEAR | {"factor": 10**400}},
            r"rope_scaling\.factor is 1000.*; supported: a pos",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r'rope_scaling\.rope_type is \["linear"\]; supported: default'),
    ],
)
def test_what_is_refused(variant: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(write(tmp_path, "llama", variant))
