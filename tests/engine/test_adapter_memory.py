"""Memory that adapters may take is part of the plan, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire.config import EngineConfig
from quire.engine.checkpoint import bundled_folder
from quire.engine.memory_plan import plan_memory
from quire.errors import ConfigError
from quire.model_config import ModelConfig
from tests.lora.test_adapter_folder import TENSORS, write

GIB = 2**30


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return replace(ModelConfig.from_folder(bundled_folder()), tie_word_embeddings=False)


def planned(model: ModelConfig, **options: object) -> int:
    config = EngineConfig(num_blocks=100, max_num_seqs=8, max_num_batched_tokens=64, **options)  # type: ignore[arg-type]
    plan = plan_memory(config, model, available=GIB)
    without = plan_memory(replace(config, enable_lora=False, lora_modules=()), model, available=GIB)
    assert without.adapters == 0
    assert plan.total == without.total + plan.adapters
    assert any("adapters" in line for line in plan.describe()) == bool(plan.adapters)
    return plan.adapters


def test_slots_hold_the_highest_rank_in_every_layer(model: ModelConfig) -> None:
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    a_layer = (queries + 2 * keys + 4 * hidden) + (hidden + 2 * queries) + (2 * inner + 2 * hidden)
    a_layer += hidden + 2 * inner
    ends = 2 * (model.vocab_size + 2 * hidden)
    gathered = 3 * 64 * max(hidden, inner, queries)
    for slots, rank in ((1, 1), (3, 8)):
        expected = 4 * (slots * rank * (a_layer * model.num_layers + ends) + gathered)
        assert planned(model, enable_lora=True, max_loras=slots, max_lora_rank=rank) == expected


def test_whole_weights_of_the_named_adapters(model: ModelConfig, tmp_path: Path) -> None:
    """Room for those of as many adapters as there are slots, the largest."""
    modules = []
    for rows in (40, 64, 7):
        head = {"lm_head.weight": torch.ones(rows, 10)}
        folder = write(tmp_path / str(rows), TENSORS | head, modules_to_save=["lm_head"])
        modules.append(f"{rows}={folder}")
    slots = planned(model, enable_lora=True, max_loras=2)
    assert planned(model, lora_modules=tuple(modules), max_loras=2) - slots == 4 * 10 * (64 + 64)


@pytest.mark.parametrize(
    "options", [{"max_loras": 0}, {"max_loras": 10**6}, {"max_lora_rank": 0}, {"max_lora_rank": 1.5}]
)
def test_limits(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        EngineConfig(enable_lora=True, **options)  # type: ignore[arg-type]
