"""What stands for a card where there is none: a CPU, Triton's interpreter, graphs that launch again, and a clock that
knows one time. So the suites of a GPU run to their end without one, and only what they would measure is missing."""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_kernels
from benchmarks.from_sources import ENGINE_NEEDS, missing
from benchmarks.gpu_kernels import Card
from quire.attention.triton import PlanBuffers
from quire.config import EngineConfig
from quire.engine import build, memory_plan
from quire.engine.memory_plan import MemoryPlan, plan_memory
from quire.model_config import ModelConfig
from tests.kernels.triton.test_steps import fake_capture

KERNEL_SIZES: dict[str, Any] = {
    "BLOCK_SIZE": 16,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 1,
    "HEAD_DIM": 16,
    "MIN_KV_BYTES": 1,
    "LARGE_DECODE": [(2, 70)],
    "SMALL_DECODE": [(1, 40)],
    "RAGGED": [100, 20],
    "SHARED": [(8, 32)],
    "PREFILL": [40],
    "SMALL_TOKENS": 2,
    "HIDDEN": 64,
    "INNER": 48,
    "VOCAB": 300,
    "CEILING_BYTES": 1024,
    "CEILING_SIZE": 32,
}
"""In the place of the constants of `benchmarks.gpu_kernels`."""
SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
"""In the place of what makes `benchmarks.gpu.SHAPES` large."""
ENGINE_SIZES: dict[str, Any] = {
    "DECODE_TARGETS": {name: {1: targets[1], 4: targets[256]} for name, targets in gpu.DECODE_TARGETS.items()},
    "WORKLOAD": (3, 3, 5),
    "CONTEXT": 12,
    "DECODE_STEPS": 6,
    "COMPARED": (2, 4, 2),
    "REPEATS": 1,
    "CONTINUOUS_BATCHING": {"num_blocks": 4, "max_batch_tokens": 16},
}
"""In the place of the constants of `benchmarks.gpu`."""


class NoCard(Card):
    """Each launch runs once, in a second."""

    device = torch.device("cpu")
    name = "No card: a rehearsal on a CPU, in which nothing is measured"

    def seconds_of(self, launches: Sequence[Callable[[], object]]) -> float:
        launches[0]()
        return 1.0

    def time(self, run: Callable[[], object]) -> float:
        run()
        return 1.0

    def clean_up(self) -> None:
        gc.collect()


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is asked for CUDA computes on the CPU what it would launch, captures and overlap included."""

    def planned(config: EngineConfig, model: ModelConfig, *arguments: Any, **options: Any) -> MemoryPlan:
        if config.device == "cpu":
            return plan_memory(config, model, *arguments, **options)
        backend = "triton" if config.attention_backend == "auto" else config.attention_backend
        plan = plan_memory(replace(config, device="cpu", attention_backend="sdpa"), model, *arguments, **options)
        return replace(
            plan,
            attention_backend=backend,
            graphs=int(backend == "triton" and not config.enforce_eager),
            async_scheduling=config.async_scheduling is not False,
        )

    monkeypatch.setattr(memory_plan, "plan_memory", planned)
    if not missing(ENGINE_NEEDS):
        monkeypatch.setattr("quire.engine.engine.plan_memory", planned)
    monkeypatch.setattr(build, "CudaCapture", lambda: fake_capture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=1))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks of a size that the interpreter can do; prefixes are shared wherever they can be."""
    for name, value in KERNEL_SIZES.items():
        assert hasattr(gpu_kernels, name)
        monkeypatch.setattr(gpu_kernels, name, value)
        monkeypatch.setattr(gpu, name, value, raising=False)
    for name, value in ENGINE_SIZES.items():
        assert hasattr(gpu, name)
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "SHAPES", {name: {**shape, **SHAPE} for name, shape in gpu.SHAPES.items()})
    sizes = {"max_model_len": 64, "max_num_seqs": 4, "block_size": 16, "num_blocks": 40, "threads": 1}
    monkeypatch.setattr(gpu, "ENGINE", {**gpu.ENGINE, **sizes})
    monkeypatch.setitem(PlanBuffers.__init__.__kwdefaults__, "min_shared_bytes", -math.inf)
