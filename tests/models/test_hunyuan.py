"""What Hunyuan has that Llama has not: norms after the rotation, a base stretched once, lists of numbers of experts."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import CheckpointError
from quire.model_config import ModelConfig
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_equals_transformers

ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 30.0}


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("hunyuan", {"attention_bias": True, "tie_word_embeddings": True}),
        ("hunyuan-moe", {"rope_parameters": ALPHA, "moe_topk": 3, "head_dim": 20}),
        ("hunyuan-moe", {"num_experts": 1, "moe_topk": 1}),
    ],
    ids=str,
)
def test_equals_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_topk": [2, 1, 2]}, r"moe_topk is \[2, 1, 2\]; supported: one number for all layers"),
        ({"moe_topk": []}, r"moe_topk is \[\]; supported: one number"),
        ({"num_experts": [4.0, 4.0, 4.0]}, r"num_experts is \[4.0, 4.0, 4.0\]; supported: one number"),
        ({"moe_topk": 5}, "moe_topk is 5; supported: at most the number of experts 4"),
        ({"rope_parameters": {**ALPHA, "alpha": "x"}}, 'alpha is "x"; supported: a positive number'),
        ({"rope_parameters": {**ALPHA, "alpha": -1.0}}, "alpha is -1.0; supported: a positive number"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = change_config(make_checkpoint(tmp_path, "hunyuan-moe"), **changes)
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(folder)


def test_a_stretch_by_alpha_is_hunyuans_alone(tmp_path: Path) -> None:
    folder = change_config(make_checkpoint(tmp_path, "llama"), rope_parameters={**ALPHA, "factor": 2.0})
    rope = ModelConfig.from_folder(folder).rope
    assert rope is not None
    assert (rope.rope_type, rope.theta) == ("dynamic", 10000.0)
