"""`quire bench latency`: seconds for one batch from start to end, repeated."""

import statistics
import time
from typing import Any

from quire.cli.bench_workload import WorkloadOptions, check_counts, make_workload, show
from quire.cli.options import ModelArgument, OutputJson, flags
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.sampling_params import SamplingParams
from quire.simulation.measures import percentile

_PERCENTILES = (10, 25, 50, 75, 90, 99)


@flags(EngineConfig)
def latency(
    model: ModelArgument = "",
    *,
    batch_size: int = 8,
    input_len: int = 32,
    output_len: int = 128,
    num_iters_warmup: int = 2,
    num_iters: int = 5,
    output_json: OutputJson = None,
    **options: Any,
) -> None:
    """Measure the seconds for one batch from start to end.

    Parameters
    ----------
    batch_size
        Prompts in the batch.
    input_len
        Tokens per prompt.
    output_len
        Tokens generated per prompt.
    num_iters_warmup
        Runs before the measured ones.
    num_iters
        Measured runs.
    """
    from quire.llm import LLM

    check_counts(batch_size=batch_size, num_iters=num_iters)
    if num_iters_warmup < 0:
        raise ConfigError(f"num_iters_warmup is {num_iters_warmup}; it must be at least 0")
    lengths = WorkloadOptions(num_prompts=batch_size, input_len=input_len, output_len=output_len)
    llm = LLM(model, **options)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, detokenize=False, temperature=0.0)
    latencies = []
    for turn in range(num_iters_warmup + num_iters):
        work = make_workload(lengths, max_len=llm.memory_plan.max_model_len, seed=turn)
        started = time.perf_counter()
        llm.generate(work.prompts, params, use_tqdm=False)
        latencies.append(time.perf_counter() - started)
    counted = sorted(latencies[num_iters_warmup:])
    mean = statistics.fmean(counted)
    result = {
        "avg_latency": mean,
        **{f"p{percent}_latency": percentile(counted, percent) for percent in _PERCENTILES},
        "seconds_per_output_token": mean / output_len,
        "output_tokens_per_second": batch_size * output_len / mean,
        "latencies": latencies[num_iters_warmup:],
    }
    show(f"latency of {model or 'the bundled model'}, batch of {batch_size}", result, output_json)
