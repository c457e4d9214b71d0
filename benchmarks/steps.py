"""Time of each part of a step: `python -m benchmarks.steps MODEL [--quantization int8]`.

Measures decode steps of several batch sizes, and one prefill step of 512 tokens: milliseconds by part, medians over the
steps. Time outside the layers and the logits is the host's. The parts are timed in the running engine, by wrapping its
functions. Greedy, unless `--temperature` and `--top-p` or `--top-k` are set.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import measure_ceilings
from quire import LLM, SamplingParams
from quire.kernels import cpu
from quire.quantization import METHODS
from quire.runner.step_inputs import StepInputBuilder
from quire.sampling.sampler import Sampler
from quire.scheduler.scheduler import Scheduler

CONTEXT = 128
PROMPT = 512
STEPS = 24
HOST = ("schedule", "input batch", "plan", "sampling", "update", "the rest")
KERNELS = {
    "dense": ("linear", "linear_quantized", "rms_norm_linear", "glu_linear"),
    "attention": ("paged_attention",),
    "KV write": ("write_kv",),
    "norm": ("rms_norm", "add_rms_norm", "rms_norm_heads_"),
    "rotary": ("rotary_",),
}


class Timers:
    """Seconds of each part since the last call of `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, owner: Any, name: str, part: str) -> None:
        """Wrap `owner.name` so that its time counts as a part."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


def install(timers: Timers) -> None:
    """Call it before the engine is built: layers keep references to the functions they call."""
    for part, names in KERNELS.items():
        for name in names:
            timers.around(cpu, name, part)
    timers.around(Scheduler, "schedule", "schedule")
    timers.around(Scheduler, "update", "update")
    timers.around(StepInputBuilder, "lay_out", "input batch")
    timers.around(Sampler, "sample", "sampling")


def around_model(timers: Timers, llm: LLM) -> None:
    runner: Any = llm._engine._core._executor
    timers.around(type(runner._plan_attention), "__call__", "plan")
    model = runner._model
    timers.around(type(model), "__call__", "layers")
    timers.around(type(model), "logits", "logits")


def run_steps(
    llm: LLM, timers: Timers, sampling: dict[str, Any], num_sequences: int, prompt: int, steps: int
) -> list[dict[str, float]]:
    """Seconds of the parts of each step in which all sequences decode; with 0 `steps`, of the prefill step."""
    engine = llm._engine
    llm.reset_prefix_cache()
    params = SamplingParams(**sampling, max_tokens=steps + 2, ignore_eos=True, detokenize=False)
    for index in range(num_sequences):
        ids = [3 + (7919 * index + 31 * place) % 1000 for place in range(prompt)]
        engine.add_request(str(index), {"prompt_token_ids": ids}, params)
    found = []
    while engine.has_work:
        timers.take()
        start = time.perf_counter()
        deltas = engine.step()
        whole = time.perf_counter() - start
        parts = timers.take()
        if len(deltas) == num_sequences:
            found.append(parts | {"step": whole})
    # The first step may contain the end of a prompt; the last one frees the sequences.
    return found[1:-1] if steps else found[:1]


def breakdown(steps: list[dict[str, float]]) -> dict[str, float]:
    """Median milliseconds of each part, and of the rest that no timer covers. Dense layers are without the head."""
    rows = []
    for step in steps:
        row = {part: step.get(part, 0.0) * 1e3 for part in ("step", "layers", "logits", *KERNELS, *HOST[:-1])}
        row["dense"] -= row["logits"]  # the head is a dense layer plus a few microseconds of Python
        row["other in layers"] = row["layers"] - sum(row[part] for part in KERNELS)
        row["the rest"] = row["step"] - row["layers"] - row["logits"] - sum(row[part] for part in HOST[:-1])
        row["host"] = row["step"] - row["layers"] - row["logits"]
        rows.append(row)
    return {part: statistics.median(row[part] for row in rows) for part in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=METHODS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--temperature", type=float, default=0.0, help="default: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the figures to this file, as JSON")
    arguments = parser.parse_args()
    timers = Timers()
    install(timers)
    llm = LLM(
        model=arguments.model,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        threads=arguments.threads,
        max_num_seqs=max(arguments.sequences),
        max_model_len=1024,
    )
    around_model(timers, llm)
    ceilings = measure_ceilings(0.5)
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    run_steps(llm, timers, sampling, 1, CONTEXT, 4)
    columns = {
        f"{count} rows": breakdown(run_steps(llm, timers, sampling, count, CONTEXT, STEPS))
        for count in arguments.sequences
    }
    prompts = [step for _ in range(5) for step in run_steps(llm, timers, sampling, 1, PROMPT, 0)]
    columns[f"{PROMPT} of a prompt"] = breakdown(prompts)
    name, stored = Path(arguments.model).name, arguments.quantization or arguments.dtype
    machine = f"{torch.get_num_threads()} threads, {cpu.isa()}"
    print(f"{name}, {stored}, {machine}; {json.dumps(sampling)}; {json.dumps(ceilings)}")
    print("\nmilliseconds | " + " | ".join(columns))
    print("--- | " + " | ".join("---" for _ in columns))
    for part in ("step", "layers", *KERNELS, "other in layers", "logits", "host", *HOST):
        print(f"{part} | " + " | ".join(f"{column[part]:.3f}" for column in columns.values()))
    if arguments.output:
        found = {
            "weights": stored,
            "sampling": sampling,
            "kv_cache_dtype": llm._engine.memory_plan.kv_cache_dtype,
            "context": CONTEXT + STEPS // 2,
            "ceilings": ceilings,
        }
        arguments.output.write_text(json.dumps(found | {"steps": columns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
