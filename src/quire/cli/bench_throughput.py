"""`quire bench throughput`: tokens per second of the offline engine over a batch of prompts."""

import time
from dataclasses import dataclass
from typing import Any

from quire.cli.bench_workload import WorkloadOptions, make_workload, show
from quire.cli.options import ModelArgument, OutputJson, flags, split
from quire.config import EngineConfig
from quire.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions(WorkloadOptions):
    """Flags of `quire bench throughput`."""

    n: int = 1
    """Samples per prompt."""


@flags(ThroughputOptions, EngineConfig)
def throughput(model: ModelArgument = "", *, output_json: OutputJson = None, **options: Any) -> None:
    """Measure tokens per second over a batch of prompts, all added at the start."""
    from quire.llm import LLM

    load, engine_options = split(options, ThroughputOptions, EngineConfig)
    asked = ThroughputOptions(**load)
    llm = LLM(model, **engine_options)
    work = make_workload(asked, max_len=llm.memory_plan.max_model_len, seed=engine_options.get("seed", 0))
    params = [
        SamplingParams(n=asked.n, max_tokens=length, ignore_eos=True, detokenize=False) for length in work.output_lens
    ]
    llm.generate([work.prompts[0]], params[0], use_tqdm=False)  # warm up: `bench startup` measures first-use costs
    llm.reset_prefix_cache()
    before = llm.stats()
    started = time.perf_counter()
    outputs = llm.generate(work.prompts, params)
    elapsed = time.perf_counter() - started
    num_output = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    stats = llm.stats()
    result = {
        "elapsed_time": elapsed,
        "num_requests": asked.num_prompts,
        "total_input_tokens": work.num_input_tokens,
        "total_output_tokens": num_output,
        "total_num_tokens": work.num_input_tokens + num_output,
        "requests_per_second": asked.num_prompts / elapsed,
        "tokens_per_second": (work.num_input_tokens + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
        "num_steps": stats.total_steps - before.total_steps,
        "num_preemptions": stats.total_preemptions - before.total_preemptions,
    }
    show(f"throughput of {model or 'the bundled model'}, {asked.dataset} lengths", result, output_json)
