"""Files of a checkpoint with any value at any key: a `CheckpointError` that names the file, or a config; in no time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.config import EngineConfig
from quire.engine.chat_template import ChatTemplate
from quire.engine.checkpoint import read_default_params
from quire.engine.tokenizer import Tokenizer
from quire.errors import CheckpointError
from quire.model_config import ARCHITECTURES, ModelConfig
from quire.model_config.family_keys import OPTIONAL_KEYS
from quire.models.checkpoint_formats import open_checkpoint
from tests.checkpoints import FAMILIES, write_tokenizer
from tests.model_config.test_published import PUBLISHED

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(
        [10**9, 10**400, -(10**12), 0.5, -1.0, float("nan"), float("inf"), "", "linear", "yarn", "x", "8"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "name", "template"]), inner)
    ),
    max_leaves=4,
)
SETTINGS = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KEYS = sorted(
    {key for config in PUBLISHED.values() for key in config}
    | OPTIONAL_KEYS
    | {"rope_parameters", "rope_scaling", "quantization_config", "quantization", "text_config", "dtype", "hidden_act"}
)


def refused_with(path: Path, read: Any) -> None:
    """Nothing is raised, or a `CheckpointError` that names the file."""
    started = time.perf_counter()
    message = str(path)
    try:
        read()
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert len(message) < 4000
    assert time.perf_counter() - started < 10


@SETTINGS
@given(st.sampled_from(sorted(PUBLISHED)), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_config_json(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED[name] | changes))

    def read() -> None:
        config = ModelConfig.from_folder(tmp_path)
        assert config.spec.num_parameters > 0

    refused_with(path, read)


@SETTINGS
@given(st.dictionaries(st.sampled_from(["temperature", "top_p", "top_k", "max_new_tokens", "eos_token_id"]), VALUES))
def test_generation_config(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["distilgpt2"]))
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(values))

    def read() -> None:
        ModelConfig.from_folder(tmp_path)
        read_default_params(EngineConfig(), tmp_path)

    refused_with(path, read)


TOKENIZER_KEYS = ["added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "bos_token", "eos_token"]


@SETTINGS
@given(st.dictionaries(st.sampled_from([*TOKENIZER_KEYS, "chat_template", "add_bos_token", "legacy"]), VALUES))
def test_tokenizer_config(tmp_path: Path, values: dict[str, Any]) -> None:
    if not (tmp_path / "tokenizer.json").exists():
        write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(values))

    def read() -> None:
        Tokenizer.from_folder(tmp_path)
        ChatTemplate.from_folder(tmp_path)

    refused_with(path, read)


@SETTINGS
@given(
    st.dictionaries(st.sampled_from(["weight_map", "metadata"]), VALUES | st.dictionaries(st.text(max_size=3), VALUES))
)
def test_index(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, '{"a": 1' + "0" * 5000 + "}", "\x00", "1"])
def test_json_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read as JSON|holds a JSON)"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3-moe"])
@pytest.mark.parametrize("number", [10**9, 10**18])
def test_many_layers_are_refused_at_once(family: str, number: int, tmp_path: Path) -> None:
    config_class, model_class, options = FAMILIES[family]
    config = config_class(**options)
    config.architectures = [model_class.__name__]
    config.save_pretrained(tmp_path)
    path, key = tmp_path / "config.json", "n_layer" if family == "gpt2" else "num_hidden_layers"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: number}))
    assert model_class.__name__ in ARCHITECTURES
    with pytest.raises(CheckpointError, match=rf"{key} is {number}; supported: an integer of at most 4096"):
        ModelConfig.from_folder(tmp_path)
