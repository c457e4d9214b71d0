"""The memory plan is arithmetic: these tests do it by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire.config import EngineConfig
from quire.engine.checkpoint import bundled_folder
from quire.engine.device import Device
from quire.engine.memory_plan import plan_memory
from quire.errors import ConfigError, MemoryPlanError
from quire.kernels import reference
from quire.kv_cache.storage import KVCache
from quire.kv_groups import KVLayout
from quire.model_config import ModelConfig

GIB = 2**30


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        layer_windows=(0, 0),
        checkpoint_dtype="float16",
    )


def test_sizes_of_a_plan(model: ModelConfig) -> None:
    plan = plan_memory(EngineConfig(num_blocks=100, max_num_seqs=8), model, available=GIB)
    assert (plan.dtype, plan.kv_cache_dtype) == ("float16", "float16")
    assert plan.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, head_dim, bytes
    assert plan.kv_cache == 100 * 16 * plan.kv_bytes_per_token
    assert plan.weights == model.spec.weight_bytes("float16")
    assert plan.total == plan.weights + plan.activations + plan.logprobs + plan.kv_cache
    assert plan.logprobs == 64 * (2 * 4 * 1000 + 40 * 21)  # positions: two rows of float32, and what is reported
    assert plan.max_model_len == 1024
    assert plan.num_longest_sequences == 1  # 64 of the 100 blocks each
    assert plan.max_num_batched_tokens == 512


@pytest.mark.parametrize(
    ("options", "without_pairs", "with_pairs"),
    [
        ({"dtype": "float32"}, "float32", "float32"),
        ({"dtype": "float16"}, "float16", "float16"),
        ({"dtype": "bfloat16"}, "float16", "bfloat16"),
        ({"dtype": "float32", "quantization": "int8"}, "float16", "bfloat16"),
        ({"dtype": "float16", "quantization": "int4"}, "float16", "bfloat16"),
        ({"dtype": "bfloat16", "kv_cache_dtype": "float16"}, "float16", "float16"),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, "int8", "int8"),
    ],
)
def test_the_type_of_kv(model: ModelConfig, options: dict[str, str], without_pairs: str, with_pairs: str) -> None:
    config = EngineConfig.from_options({"num_blocks": 100, **options})
    for multiplies, expected in ((False, without_pairs), (True, with_pairs)):
        device = Device("cpu", multiplies_bfloat16=multiplies)
        assert plan_memory(config, model, available=GIB, device=device).kv_cache_dtype == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_plan_counts_what_the_pool_takes(model: ModelConfig, dtype: str) -> None:
    plan = plan_memory(EngineConfig(num_blocks=7, kv_cache_dtype=dtype), model, available=GIB)
    shapes = reference.kv_cache_shapes(7, 2, 16, 16, scaled=dtype == "int8")
    cache = KVCache(groups=KVLayout.of(model.spec).groups, shapes=shapes, block_size=16, dtype=getattr(torch, dtype))
    assert plan.kv_cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_the_pool_takes_its_share_but_never_more_than_could_be_used(model: ModelConfig) -> None:
    small = plan_memory(EngineConfig(max_num_seqs=4), model, available=5 * 2**19)
    left = small.available - small.weights - small.activations - small.logprobs
    assert small.kv_cache <= left * 0.5 < small.kv_cache + 16 * small.kv_bytes_per_token
    large = plan_memory(EngineConfig(max_num_seqs=4), model, available=64 * GIB)
    assert large.num_blocks == 4 * 1024 // 16


def test_the_context_shrinks_to_the_pool_unless_it_was_asked_for(model: ModelConfig) -> None:
    assert plan_memory(EngineConfig(num_blocks=10), model, available=GIB).max_model_len == 160
    with pytest.raises(
        MemoryPlanError, match=r"max_model_len 200 tokens takes .* max_model_len 160 would fit, or kv_cache_memory"
    ):
        plan_memory(EngineConfig(num_blocks=10, max_model_len=200), model, available=GIB)


def test_what_cannot_fit_is_refused_with_what_would(model: ModelConfig) -> None:
    with pytest.raises(
        MemoryPlanError, match=r"the model does not fit: weights take .* as float32 .* as float16 the weights take"
    ):
        plan_memory(EngineConfig(dtype="float32"), model, available=700_000)
    with pytest.raises(MemoryPlanError, match=r"1000000 KV blocks take .* blocks \(.*\) would fit"):
        plan_memory(EngineConfig(num_blocks=1_000_000), model, available=GIB)
    with pytest.raises(MemoryPlanError, match=r"no room for one block"):
        plan_memory(EngineConfig(kv_cache_memory=100), model, available=GIB)
    with pytest.raises(ConfigError, match="max_model_len is 2048, but the model knows 1024 positions"):
        plan_memory(EngineConfig(max_model_len=2048), model, available=GIB)


def test_the_budget_of_log_probabilities(model: ModelConfig) -> None:
    def budget(**options: int | str) -> int:
        return plan_memory(EngineConfig.from_options({"num_blocks": 100, **options}), model, available=GIB).logprobs

    assert budget(max_logprobs=0) == 64 * (8000 + 40)
    assert budget(logprobs_memory="1MiB") == 2**20
    assert budget(max_logprobs=2**20) == 64 * (8000 + 40 * 1001)
    large = replace(model, vocab_size=2_000_000)
    assert plan_memory(EngineConfig(num_blocks=1), large, available=64 * GIB).logprobs == 64 * 2**20
    with pytest.raises(MemoryPlanError, match=r"logprobs_memory is 1000 B, but one position .* takes 8.633 KiB"):
        budget(logprobs_memory=1000)


def test_memory_holds_all_experts_and_steps_the_active_ones(model: ModelConfig) -> None:
    config = EngineConfig(num_blocks=100, max_num_seqs=8)
    plans = [
        plan_memory(config, replace(model, num_experts=8, num_experts_per_token=k, expert_intermediate_size=128), GIB)
        for k in (1, 2)
    ]
    dense = plan_memory(config, model, GIB)
    expert, router = 3 * 64 * 128, 8 * 64
    assert [plan.weights - dense.weights for plan in plans] == [2 * (7 * expert + router) * 2] * 2  # layers, float16
    # One more expert for a token: its copy of the token's row, gate, up, their product, and its output.
    assert plans[1].activations - plans[0].activations == 512 * (64 + 3 * 128 + 64) * 4
    assert plans[0].kv_bytes_per_token == dense.kv_bytes_per_token


def test_the_description_names_everything(model: ModelConfig) -> None:
    text = "\n".join(plan_memory(EngineConfig(num_blocks=128, max_num_seqs=8), model, available=GIB).describe())
    for part in (
        "weights",
        "activations",
        "log-probabilities",
        "KV cache",
        "128 blocks of 16 tokens = 2048 tokens",
        "longest context 1024",
        "2 sequences",
    ):
        assert part in text


def test_the_plan_of_the_bundled_model_is_what_loading_it_takes(tmp_path: Path) -> None:
    plan = plan_memory(EngineConfig(num_blocks=64), ModelConfig.from_folder(bundled_folder()))
    weights = (bundled_folder() / "model.safetensors").stat().st_size
    # Norms are widened to float32; the tied table is held once.
    assert weights * 0.98 < plan.weights < weights * 1.02


def test_the_stage_with_the_smallest_pool_decides(model: ModelConfig) -> None:
    """Here the last one has the most layers beside an end."""
    model = replace(model, num_layers=5, layer_windows=(0,) * 5, vocab_size=10)
    config = EngineConfig(pipeline_parallel_size=2, tensor_parallel_size=2, kv_cache_memory=2**20)
    plan = plan_memory(config, model, available=GIB)
    assert plan.num_ranks == 4
    assert plan.available == GIB // 4
    assert plan.kv_bytes_per_token == 3 * 2 * 1 * 16 * 2  # layers, keys and values, heads, head_dim, bytes
    assert plan.num_blocks == 2**20 // (16 * plan.kv_bytes_per_token)
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 6, too many for the 5 layers"):
        plan_memory(EngineConfig(pipeline_parallel_size=6), model, available=GIB)
    for option in ("disk_cache", "swap_space"):
        with pytest.raises(ConfigError, match=f"pipeline_parallel_size is 2, but {option} is .*, which needs one rank"):
            EngineConfig(pipeline_parallel_size=2, **{option: "1GiB"})
    same = plan_memory(replace(config, kv_cache_memory=None, num_blocks=8), model, available=GIB)
    assert same.kv_cache == 8 * 16 * plan.kv_bytes_per_token, "of the stage with the largest blocks"
