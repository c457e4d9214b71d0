"""`quire bench memory`: share of the allocated KV cache that holds tokens, after each step under load."""

import statistics
from dataclasses import dataclass
from typing import Any, Protocol

from quire.cli.bench_workload import Workload, WorkloadOptions, make_workload, show
from quire.cli.options import ModelArgument, OutputJson, flags, split
from quire.config import EngineConfig
from quire.outputs import EngineStats
from quire.sampling_params import SamplingParams


class SteppingEngine(Protocol):
    """The part of `quire.engine.engine.Engine` that is used here; importing the class would import torch."""

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams, /) -> object: ...
    def step(self) -> object: ...
    def stats(self) -> EngineStats: ...
    @property
    def has_work(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions(WorkloadOptions):
    """Flags of `quire bench memory`."""

    dataset: str = "sharegpt"
    range_ratio: float = 0.5
    n: int = 1
    """Samples per prompt, which share its blocks."""
    beam_width: int | None = None
    """Beams per prompt: beam search instead of sampling."""


@flags(MemoryOptions, EngineConfig)
def memory(model: ModelArgument = "", *, output_json: OutputJson = None, **options: Any) -> None:
    """Measure the share of the allocated KV cache that holds tokens (the paper's Fig. 2), and what sharing saves."""
    from quire.engine.engine import Engine

    load, engine_options = split(options, MemoryOptions, EngineConfig)
    asked = MemoryOptions(**load)
    engine = Engine(EngineConfig.from_options({"model": model, **engine_options}), report=lambda line: None)
    work = make_workload(asked, max_len=engine.memory_plan.max_model_len, seed=engine_options.get("seed", 0))
    figures = measure_memory(engine, work, n=asked.n, beam_width=asked.beam_width)
    show(f"KV cache of {model or 'the bundled model'}, {asked.dataset} lengths", figures, output_json)


def measure_memory(
    engine: SteppingEngine, work: Workload, *, n: int = 1, beam_width: int | None = None
) -> dict[str, Any]:
    """Add all requests, then step until they finish. Returns the statistics of the pool over all steps."""
    for index, (prompt, length) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        params = SamplingParams(n=n, beam_width=beam_width, max_tokens=length, ignore_eos=True, detokenize=False)
        engine.add_request(str(index), prompt, params)
    seen: list[EngineStats] = []
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        if stats.num_allocated_slots:
            seen.append(stats)
    return _figures(seen)


def _figures(seen: list[EngineStats]) -> dict[str, Any]:
    filled = sum(stats.num_filled_slots for stats in seen)
    allocated = sum(stats.num_allocated_slots for stats in seen)
    shared = sum(stats.num_shared_slots for stats in seen)
    return {
        "num_steps": len(seen),
        "block_size": seen[-1].block_size,
        "num_blocks": seen[-1].num_blocks,
        "peak_used_blocks": max(stats.num_used_blocks for stats in seen),
        "mean_running": statistics.fmean(stats.num_running for stats in seen),
        "filled_percent": 100 * filled / allocated,
        "waste_percent": 100 * (1 - filled / allocated),
        "saved_by_sharing_percent": 100 * shared / (allocated + shared),
        "num_preemptions": seen[-1].total_preemptions,
        "num_block_copies": seen[-1].total_block_copies,
    }
