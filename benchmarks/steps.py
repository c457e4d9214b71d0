"""Where a step's time goes: `python -m benchmarks.steps MODEL [--quantization int8]`.

Steps of decoding with so many sequences each, and one step of a prompt's 512 tokens, milliseconds by part, medians over
the steps. What is outside the layers and the logits is the host's. The parts are timed in the running engine, by
functions put around its own. Greedy, unless `--temperature` and `--top-p` or `--top-k` ask for samples.
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
from quire.runner import model_runner
from quire.runner.model_runner import ModelRunner
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
    """Seconds of each part since `take` was last called."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, owner: Any, name: str, part: str) -> None:
        """Time `owner.name` from now on, as a part."""
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
    """Before the engine is built, since layers keep the functions they call."""
    for part, names in KERNELS.items():
        for name in names:
            timers.around(cpu, name, part)
    timers.around(Scheduler, "schedule", "schedule")
    timers.around(Scheduler, "update", "update")
    timers.around(model_runner, "make_input_batch", "input batch")
    timers.around(Sampler, "sample", "sampling")
    timers.around(ModelRunner, "execute", "execute")


def around_model(timers: Timers, llm: LLM) -> None:
    runner: Any = llm._engine._core._executor
    timers.around(runner, "_plan_attention", "plan")
    model = runner._model
    timers.around(type(model), "__call__", "layers")
    timers.around(type(model), "logits", "logits")


def run_steps(
    llm: LLM, timers: Timers, sampling: dict[str, Any], num_sequences: int, prompt: int, steps: int
) -> list[dict[str, float]]:
    """Parts of each step in which all sequences decode, or with `steps` of 0 of the one that computes the prompt."""
    engine = llm._engine
    llm.reset_prefix_cache()
    params = SamplingParams(**sampling, max_tokens=steps + 2, ignore_eos=True, detokenize=False)
    for index in range(num_sequences):
        ids = [3 + (7919 * index + 31 * place) % 30000 for place in range(prompt)]
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
    # The first of them may hold the end of a prompt, the last frees the sequences.
    return found[1:-1] if steps else found[:1]


def breakdown(steps: list[dict[str, float]]) -> dict[str, float]:
    """Median milliseconds of each part, the dense layers without the head; what no timer covers is the rest."""
    rows = []
    for step in steps:
        row = {part: step.get(part, 0.0) * 1e3 for part in ("step", "layers", "logits", *KERNELS, *HOST[:-1])}
        row["dense"] -= row["logits"]  # the head is a dense layer, but for a few microseconds of Python
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
