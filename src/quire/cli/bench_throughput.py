"""`quire bench throughput`: a batch of prompts through the offline engine, as fast as it goes."""

import time
from typing import Any

from quire.cli.bench_workload import make_workload, show
from quire.cli.options import ModelArgument, OutputJson, flags
from quire.config import EngineConfig
from quire.sampling_params import SamplingParams


@flags(EngineConfig)
def throughput(
    model: ModelArgument = "",
    *,
    dataset: str = "random",
    num_prompts: int = 64,
    input_len: int = 128,
    output_len: int = 128,
    range_ratio: float = 0.0,
    n: int = 1,
    output_json: OutputJson = None,
    **options: Any,
) -> None:
    """Measure tokens per second over a batch of prompts.

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
        Samples per prompt.
    """
    from quire.llm import LLM

    llm = LLM(model, **options)
    max_len = llm.memory_plan.max_model_len
    work = make_workload(
        dataset,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        max_len=max_len,
        seed=options.get("seed", 0),
    )
    params = [SamplingParams(n=n, max_tokens=length, ignore_eos=True, detokenize=False) for length in work.output_lens]
    llm.generate([work.prompts[0]], params[0], use_tqdm=False)  # first-use costs are `bench startup`'s
    llm.reset_prefix_cache()
    before = llm.stats()
    started = time.perf_counter()
    outputs = llm.generate(work.prompts, params)
    elapsed = time.perf_counter() - started
    num_output = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    stats = llm.stats()
    result = {
        "elapsed_time": elapsed,
        "num_requests": num_prompts,
        "total_input_tokens": work.num_input_tokens,
        "total_output_tokens": num_output,
        "total_num_tokens": work.num_input_tokens + num_output,
        "requests_per_second": num_prompts / elapsed,
        "tokens_per_second": (work.num_input_tokens + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
        "num_steps": stats.total_steps - before.total_steps,
        "num_preemptions": stats.total_preemptions - before.total_preemptions,
    }
    show(f"throughput of {model or 'the bundled model'}, {dataset} lengths", result, output_json)
