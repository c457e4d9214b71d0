"""Models from GGUF files: logits of every family beside transformers', and files that do not fit."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.gguf_files import write_gguf
from tests.models.parity import assert_close, expected_logits, prompt
from tests.paged_model import PagedModel

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("llama", {}),
    "llama-rope-yarn": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": (
        "gemma3",
        {
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "layer_types": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 4}),
    "olmo2": ("olmo2", {}),
    "cohere-qk-norm": ("command-r", {}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": None}),
    "glm4": ("glm4", {}),
    "mixtral": ("llama", {}),
    "qwen2-moe": ("qwen2moe", {"mlp_only_layers": []}),
    "phi3": ("phi3", {}),
    "stablelm-parallel": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gptneox", {}),
    "phi": ("phi2", {}),
    "falcon": ("falcon", {}),
    "falcon-new": ("falcon", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
}
METADATA: dict[str, dict[str, Any]] = {"gemma3": {"rope__freq_base": 5000.0, "rope__freq_base_swa": 300.0}}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    arch, overrides = FAMILIES[family]
    folder = make_checkpoint(tmp_path, family, **overrides)
    path = write_gguf(folder, tmp_path / "model.gguf", arch, **METADATA.get(family, {}))
    ids = prompt(40)
    assert_close(PagedModel(path).step({0: ids})[0], expected_logits(folder, ids))
