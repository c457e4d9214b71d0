"""The planner against the engine: memory and throughput as planned, beside what a real run took.

    python -m benchmarks.planner memory MODEL… [--dtype …] [--quantization …]
    python -m benchmarks.planner speed MODEL --device FILE [--dtype …] [--quantization …]

`memory` fills every block of a pool, with full steps and log-probabilities asked for, and looks at what the system
shows; a process each, and the interpreter's own from a run of the bundled model. `speed` runs workloads of the lengths
of W1 and W2 and W5 itself (see benchmarks.peers), and simulates them on a device that `quire plan --measure` wrote.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quire.cli.bench_workload import make_workload
from quire.cli.plan import peak_resident
from quire.config import EngineConfig
from quire.model_config import ModelConfig
from quire.sampling_params import SamplingParams
from quire.simulation.devices import find_device
from quire.simulation.model_shapes import ModelShape
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.trace import HASH_BLOCK_TOKENS, Trace, TraceRow

NUM_SEQUENCES, CONTEXT = 32, 1024


def resident(field: str = "VmHWM") -> int:
    """Bytes of this process in memory, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def fill(model: str, dtype: str, quantization: str | None) -> dict[str, Any]:
    """Load a model, write every block of its pool, and say what was planned and what the process took."""
    from quire.engine.engine import Engine

    config = EngineConfig(
        model=model,
        dtype=dtype,
        quantization=quantization,
        max_num_seqs=NUM_SEQUENCES,
        max_model_len=CONTEXT,
        num_blocks=NUM_SEQUENCES * CONTEXT // 16,
        enable_prefix_caching=False,
    )
    engine = Engine(config, lambda line: None)
    output = 96  # so many that nobody ends before the last prompt is computed
    params = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False, logprobs=20, seed=0)
    for number in range(NUM_SEQUENCES):
        prompt = [3 + (5 * place + number) % 200 for place in range(CONTEXT - output)]
        engine.add_request(f"{number}", prompt, params)
    while engine.has_work:
        engine.step()
    plan = engine.memory_plan
    planned = peak_resident(plan, None)
    return {"plan": plan.total, "planned": planned["total"], "measured": resident()}


def memory(models: list[str], kinds: list[tuple[str, str | None]]) -> None:
    """A process for each; what the bundled model's takes beyond its plan is the interpreter's and the libraries'."""
    base = _child("", "float32", None)
    process = base["measured"] - base["planned"]
    print(f"interpreter and libraries: {process / 2**20:.0f} MiB")
    print("| model | stored as | planned, MiB | measured, MiB | difference |\n| --- | --- | --- | --- | --- |")
    for model in models:
        for dtype, quantization in kinds:
            figures = _child(model, dtype, quantization)
            planned = process + figures["planned"]
            print(
                f"| {Path(model).name or 'bundled'} | {quantization or dtype} | {planned / 2**20:,.0f} | "
                f"{figures['measured'] / 2**20:,.0f} | {100 * (planned / figures['measured'] - 1):+.1f} % |",
                flush=True,
            )


def _child(model: str, dtype: str, quantization: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.planner", "fill", model, "--dtype", dtype]
    command += ["--quantization", quantization] if quantization else []
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return figures


def workloads() -> dict[str, tuple[list[list[int]], list[int], list[TraceRow]]]:
    """Prompts, output lengths, and the same as rows of a trace that all arrive at once."""
    mixed = make_workload(
        "random", num_prompts=64, input_len=136, output_len=116, range_ratio=0.9, max_len=4096, seed=1
    )
    tail = 32
    prefix = [3 + 7 * place % 200 for place in range(HASH_BLOCK_TOKENS)]
    shared = [prefix + [3 + (place * place + number) % 240 for place in range(tail)] for number in range(64)]
    work = {
        "W1-like: 64 requests of mixed lengths": (mixed.prompts, mixed.output_lens),
        "W2-like: 64 requests that share 512 tokens": (shared, [32] * 64),
        "W5: one request, 128 + 128 tokens": ([[3 + place % 200 for place in range(128)]], [128]),
    }
    made = {}
    for name, (prompts, outputs) in work.items():
        rows = []
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            hashes = (0, 1 + number) if prompt[:HASH_BLOCK_TOKENS] == prefix else ()
            rows.append(TraceRow(len(prompt), output, 0.0, hashes))
        made[name] = (prompts, outputs, rows)
    return made


def speed(model: str, dtype: str, quantization: str | None, device_file: str, repeats: int) -> None:
    """Run each workload, simulate it, and print both."""
    from quire.llm import LLM

    llm = LLM(model, dtype=dtype, quantization=quantization, max_model_len=4096, max_num_seqs=64)
    plan = llm.memory_plan
    config = ModelConfig.from_folder(model)
    shape = ModelShape.of(config, Path(model).name, dtype=plan.dtype, quantization=quantization)
    device = find_device(device_file)
    llm.generate([[5] * 64], SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False), use_tqdm=False)
    for name, (prompts, outputs, rows) in workloads().items():
        params = [SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False, temperature=0.0) for n in outputs]
        measured = []
        for _ in range(repeats):
            llm.reset_prefix_cache()
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            measured.append(sum(outputs) / (time.perf_counter() - started))
        settings = SimulationSettings(
            trace=name,
            kv_slots=plan.num_blocks * plan.block_size,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
        )
        expected = run_simulation(Trace(name, rows), shape, device, settings)["tokens_per_s"]
        real = statistics.median(measured)
        spread = 100 * (max(measured) - min(measured)) / real
        print(
            f"| {name} | {shape.weight_format} | {expected:,.1f} | {real:,.1f} ({spread:.0f} %) | "
            f"{100 * (expected / real - 1):+.0f} % |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "fill", "speed"))
    parser.add_argument("models", nargs="+", help="folders of checkpoints; '' is the bundled model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--device", default="cpu.json")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    if options.what == "fill":
        print(json.dumps(fill(options.models[0], options.dtype, options.quantization)))
    elif options.what == "memory":
        memory(options.models, [(options.dtype, options.quantization)])
    else:
        for model in options.models:
            speed(model, options.dtype, options.quantization, options.device, options.repeats)


if __name__ == "__main__":
    main()
