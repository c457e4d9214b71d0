"""`quire bench memory`: how much of the KV cache that sequences hold has tokens in it, step by step under load."""

import statistics
from typing import Any, Protocol

from quire.cli.bench_workload import Workload, make_workload, show
from quire.cli.options import ModelArgument, OutputJson, flags
from quire.config import EngineConfig
from quire.outputs import EngineStats
from quire.sampling_params import SamplingParams


class SteppingEngine(Protocol):
    """What is asked of `quire.engine.engine.Engine`, which would import torch here."""

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams, /) -> object: ...
    def step(self) -> object: ...
    def stats(self) -> EngineStats: ...
    @property
    def has_work(self) -> bool: ...


@flags(EngineConfig)
def memory(
    model: ModelArgument = "",
    *,
    dataset: str = "sharegpt",
    num_prompts: int = 64,
    input_len: int = 128,
    output_len: int = 128,
    range_ratio: float = 0.5,
    n: int = 1,
    beam_width: int | None = None,
    output_json: OutputJson = None,
    **options: Any,
) -> None:
    """Measure how much of the allocated KV cache holds tokens (the paper's Fig. 2), and what sharing saves.

    Parameters
    ----------
    dataset
        random, or lengths like those of sharegpt or alpaca.
    num_prompts
        Prompts, all there from the start.
    input_len
        Tokens per prompt, where the dataset is random.
    output_len
        Tokens generated per sample, where the dataset is random.
    range_ratio
        Random lengths are within this share of those given.
    n
        Samples per prompt, which share its blocks.
    beam_width
        Search with so many beams per prompt instead of sampling.
    """
    from quire.engine.engine import Engine

    engine = Engine(EngineConfig.from_options({"model": model, **options}), report=lambda line: None)
    work = make_workload(
        dataset,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        max_len=engine.memory_plan.max_model_len,
        seed=options.get("seed", 0),
    )
    figures = measure_memory(engine, work, n=n, beam_width=beam_width)
    show(f"KV cache of {model or 'the bundled model'}, {dataset} lengths", figures, output_json)


def measure_memory(
    engine: SteppingEngine, work: Workload, *, n: int = 1, beam_width: int | None = None
) -> dict[str, Any]:
    """Run the work, all of it there from the start, and look at the pool after every step."""
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
