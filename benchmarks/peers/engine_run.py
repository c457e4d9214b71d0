"""One engine, one process: loads the model, runs the chosen workloads once each, reports what it measured.

Runs in the engine's own interpreter, as `python -m benchmarks.peers.engine_run`; started by `__main__.py`,
which also took the time of the start. Quire and vLLM answer to the same names, so both take the same path
through this file.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.workloads import Workload, WorkRequest, make_workloads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True, choices=["quire", "vllm"])
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--quantization", help="of Quire's weights")
    parser.add_argument("--only", required=True)
    parser.add_argument("--started-at", type=float, required=True, help="the parent's monotonic clock")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()

    library: Any = importlib.import_module(options.engine)
    extra = {"enforce_eager": options.eager, "disable_log_stats": True} if options.engine == "vllm" else {}
    if options.quantization is not None:
        extra["quantization"] = options.quantization
    llm = library.LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=4096,
        max_num_seqs=64,
        enable_prefix_caching=True,
        **extra,
    )
    workloads = make_workloads()

    def generate(requests: list[WorkRequest], *, n: int = 1, temperature: float = 0.0) -> None:
        params = [
            library.SamplingParams(
                n=n,
                temperature=temperature,
                max_tokens=request.num_output_tokens,
                min_tokens=request.num_output_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        lengths = [len(sample.token_ids) for output in outputs for sample in output.outputs]
        expected = [request.num_output_tokens for request in requests for _ in range(n)]
        if lengths != expected:
            raise RuntimeError(f"{options.engine} returned samples of {lengths} tokens instead of {expected}")

    def beam_search(requests: list[WorkRequest], *, beam_width: int) -> None:
        home = importlib.import_module(f"{options.engine}.sampling_params")
        num_output_tokens = requests[0].num_output_tokens
        params = home.BeamSearchParams(beam_width=beam_width, max_tokens=num_output_tokens, ignore_eos=True)
        outputs = llm.beam_search([{"prompt_token_ids": request.prompt_token_ids} for request in requests], params)
        lengths = [
            len(beam.tokens) - len(request.prompt_token_ids)
            for request, output in zip(requests, outputs, strict=True)
            for beam in output.sequences
        ]
        if lengths != [num_output_tokens] * (beam_width * len(requests)):
            raise RuntimeError(f"{options.engine} returned beams of {lengths} tokens instead of {num_output_tokens}")

    single = workloads["W5"].requests[0]
    generate([WorkRequest(single.prompt_token_ids, 1)])
    seconds = {"W7": time.monotonic() - options.started_at}
    stolen = {}

    generate(workloads["warm"].requests)
    for name, run in what_to_time(options.only.split(","), workloads, generate, beam_search).items():
        llm.reset_prefix_cache()
        stolen_before, start = stolen_seconds(), time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
        stolen[name] = stolen_seconds() - stolen_before
    report = {"version": library.__version__, "seconds": seconds, "stolen_cpu_seconds": stolen}
    options.report.write_text(json.dumps(report))


def what_to_time(
    only: list[str],
    workloads: dict[str, Workload],
    generate: Callable[..., None],
    beam_search: Callable[..., None],
) -> dict[str, Callable[[], None]]:
    """A call for every figure that the chosen workloads ask for."""
    calls: dict[str, Callable[[], None]] = {}
    for name in only:
        if name == "W7":  # the start of the process, which is over by now
            continue
        workload = workloads[name]
        if name == "W5":
            first_token = [WorkRequest(request.prompt_token_ids, 1) for request in workload.requests]
            calls["W5-first-token"] = partial(generate, first_token)
        if workload.beam_width is not None:
            width = workload.beam_width
            calls[f"{name}-sampled"] = partial(generate, workload.requests, n=width, temperature=1.0)
            calls[name] = partial(beam_search, workload.requests, beam_width=width)
            continue
        calls[name] = partial(generate, workload.requests, n=workload.n, temperature=workload.temperature)
    return calls


def stolen_seconds() -> float:
    """CPU time the hypervisor gave to others since boot; a run that lost some is one to repeat."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / 100


if __name__ == "__main__":
    main()
