"""What Ministral has that Llama has not: windows on some layers, and queries that grow with their position."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from quire.errors import CheckpointError
from quire.kernels import reference
from quire.layers.rotary import query_scales
from quire.model_config import ModelConfig
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("ministral", {"layer_types": None}),
        ("ministral", {"sliding_window": 1, "num_key_value_heads": 1}),
        ("ministral", {"layer_types": ["full_attention"] * 3, "tie_word_embeddings": True}),
        ("ministral3", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("ministral3", {"sliding_window": 20, "head_dim": 20, "num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "ministral3"), kernels=reference, block_size=8)


def test_queries_beyond_the_training_length(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "ministral3")
    rope = ModelConfig.from_folder(folder).rope
    assert query_scales(rope, 64, CPU) is None
    scales = query_scales(rope, 130, CPU)
    assert scales is not None
    assert scales[[63, 64, 129]].tolist() == pytest.approx([1.0, 1.3466, 1.5493], abs=1e-4)
    ids = prompt(200)
    expected = expected_logits(folder, ids)
    model = PagedModel(folder)
    assert_close(torch.cat([model.step({0: part})[0] for part in (ids[:63], ids[63:65], ids[65:])]), expected)
    # The factors change what is computed.
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"]["llama_4_scaling_beta"] = None
    path.write_text(json.dumps(values))
    assert (PagedModel(folder).step({0: ids})[0][64:] - expected[64:]).norm() > 1


def with_a_vision_tower(folder: Path, model_type: str) -> Path:
    options = {"ministral3": FAMILIES["ministral3"][2], "mistral": {**FAMILIES["mistral"][2], "sliding_window": None}}
    text = {**options[model_type], "initializer_range": 0.12, "model_type": model_type}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"head_dim": 16, "image_size": 28, "patch_size": 14, "model_type": "pixtral"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
        Mistral3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["ministral3", "mistral"])
def test_the_text_model_beside_a_vision_tower(model_type: str, tmp_path: Path) -> None:
    """Mistral Small 3 has Mistral's text model, Ministral 3 one of its own."""
    folder = with_a_vision_tower(tmp_path, model_type)
    ids = prompt(90)
    oracle = Mistral3ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids])).logits[0]
    model = PagedModel(folder)
    assert_close(torch.cat([model.step({0: ids[:70]})[0], model.step({0: ids[70:]})[0]]), expected)
    text = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if "language_model" in name]
    assert model.config.spec.num_parameters == sum(tensor.numel() for tensor in text)


def test_the_rotation_that_files_leave_unsaid(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "ministral3", rope_parameters=None, max_position_embeddings=262144)
    stated = ModelConfig.from_folder(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    path.write_text(json.dumps(values))
    assert ModelConfig.from_folder(folder) == stated
    assert stated.rope is not None
    assert (stated.rope.rope_type, stated.rope.query_scaling_beta, stated.context_length) == ("yarn", 0.1, 262144)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama_4_scaling_beta": -1}, "rope_parameters.llama_4_scaling_beta is -1; supported: a positive number"),
        ({"rope_type": "other"}, 'rope_parameters.rope_type is "other"; supported: default'),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "ministral3") / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "rope_parameters": values["rope_parameters"] | change}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
