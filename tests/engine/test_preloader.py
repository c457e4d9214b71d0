"""Preloading can be stopped at any moment and reports no fault of a checkpoint."""

import gc
from pathlib import Path

import pytest

from quire.config import EngineConfig
from quire.engine.checkpoint import bundled_folder
from quire.engine.memory_plan import plan_memory
from quire.engine.preloader import Preloader, preload, without_garbage_collection
from quire.model_config import ModelConfig
from quire.models.weights_cache import PackedTensor, WeightsCache


@pytest.mark.parametrize("num_bytes", [1, 4096, 200 << 20])
def test_memory_is_zero_whenever_it_is_asked_for(num_bytes: int) -> None:
    preloader = Preloader(bundled_folder(), num_bytes)
    preloader.finish()
    assert preloader.memory is not None
    assert len(preloader.memory) == num_bytes
    assert preloader.memory[0] == preloader.memory[-1] == 0
    preloader.memory[0] = 7
    preloader.finish()  # twice is harmless
    assert preloader.memory[0] == 7


def test_what_cannot_be_read_is_left_to_the_load(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path, None):
        preloader = Preloader(folder, 100)
        preloader.finish()
        assert preloader.memory is not None
        assert len(preloader.memory) == 100


def test_a_backend_that_packs_nothing_takes_no_memory() -> None:
    config = EngineConfig(num_blocks=64, attention_backend="sdpa")
    model = ModelConfig.from_folder(bundled_folder())
    preloader = preload(config, model, plan_memory(config, model), bundled_folder())
    preloader.finish()
    assert preloader.memory is None


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (8, 7)])
def test_stored_weights_are_checked_by_the_cores_that_the_import_leaves(
    num_cores: int, num_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Cache(WeightsCache):
        def load(self, num_threads: int = 1) -> list[PackedTensor]:
            asked.append(num_threads)
            return []

    cache = Cache(tmp_path, b"k" * 16, 1 << 20)
    cache.path.touch()
    monkeypatch.setattr("quire.engine.preloader.usable_cores", lambda: num_cores)
    Preloader(None, 0, cache).finish()
    assert asked == [num_threads]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_it_takes_what_the_plan_gives_dense_layers(quantization: str | None) -> None:
    config = EngineConfig(num_blocks=64, quantization=quantization)
    model = ModelConfig.from_folder(bundled_folder())
    plan = plan_memory(config, model)
    preloader = preload(config, model, plan, bundled_folder())
    preloader.finish()
    assert preloader.memory is not None
    assert len(preloader.memory) == plan.weights - 4 * model.spec.num_vector_parameters


def test_collection_goes_on_as_it_was() -> None:
    try:
        for switch in (gc.enable, gc.disable):
            switch()
            before = gc.isenabled()
            with without_garbage_collection():
                assert not gc.isenabled()
            assert gc.isenabled() == before
    finally:
        gc.enable()
