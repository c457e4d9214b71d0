"""The planner beside the engine: planned memory and throughput, and those of a real run.

    python -m benchmarks.planner memory MODEL… [--num-blocks 128 512]
    python -m benchmarks.planner speed MODEL --device FILE [--dtype …] [--quantization …]

`memory` loads each model in every weight format, fills every block of its pools with full steps and log-probabilities,
and reads the process's peak memory; one process each. `speed` runs workloads like W1, W2 and W5 (see benchmarks.peers)
and simulates them on a device that `quire plan --measure` wrote.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quire.cli.bench_workload import WorkloadOptions, make_workload
from quire.cli.peak_resident import peak_resident
from quire.config import EngineConfig
from quire.engine.checkpoint import find_model
from quire.model_config import ModelConfig
from quire.sampling_params import SamplingParams
from quire.simulation.devices import find_device
from quire.simulation.model_shapes import ModelShape
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.trace import HASH_BLOCK_TOKENS, Trace, TraceRow

CONTEXT = 512
"""Tokens of a sequence that fills blocks: few, because computing time does not matter here."""
KINDS = (("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4"))


def fill(config: EngineConfig) -> dict[str, Any]:
    """Load a model and write every block of its pool. Returns planned memory and the process's peak."""
    from quire.engine.engine import Engine

    engine = Engine(config, lambda line: None)
    plan = engine.memory_plan
    num_sequences = plan.num_blocks * plan.block_size // CONTEXT
    output = num_sequences + 8  # steps of 512 tokens or more: no sequence ends before the last prompt is computed
    params = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False, logprobs=20, seed=0)
    for number in range(num_sequences):
        prompt = [3 + (5 * place + number) % 200 for place in range(CONTEXT - output)]
        engine.add_request(f"{number}", prompt, params)
    peak_blocks = 0
    while engine.has_work:
        engine.step()
        peak_blocks = max(peak_blocks, engine.stats().num_used_blocks)
    engine.close()
    folder = find_model(config.model, config.revision)
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        "planned": peak_resident(plan, ModelConfig.from_folder(folder), folder)["total"],
        "measured": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")),
        "unused_blocks": plan.num_blocks - peak_blocks,
    }


def fill_in_child(**options: Any) -> dict[str, Any]:
    """`fill` in a process of its own, so that nothing else is in memory."""
    options = {"max_model_len": CONTEXT, "enable_prefix_caching": False, **options}
    command = [sys.executable, "-m", "benchmarks.planner", "fill", json.dumps(options)]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return figures


def memory(models: list[str], pools: list[int]) -> None:
    """Print a line per model, weight format and pool."""
    print("| model | stored as | pool, blocks | planned, MiB | measured, MiB | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in models:
        for dtype, quantization in KINDS:
            for num_blocks in pools:
                figures = fill_in_child(
                    model=model,
                    dtype=dtype,
                    quantization=quantization,
                    num_blocks=num_blocks,
                    max_num_seqs=num_blocks * 16 // CONTEXT,
                )
                planned, measured = figures["planned"], figures["measured"]
                print(
                    f"| {Path(model).name or 'bundled'} | {quantization or dtype} | {num_blocks} | "
                    f"{planned / 2**20:,.0f} | {measured / 2**20:,.0f} | {100 * (planned / measured - 1):+.1f} % |",
                    flush=True,
                )


def workloads() -> dict[str, tuple[list[list[int]], list[int], list[TraceRow]]]:
    """Prompts, output lengths, and rows of a trace with these lengths that arrive at once."""
    lengths = WorkloadOptions(num_prompts=64, input_len=136, output_len=116, range_ratio=0.9)
    mixed = make_workload(lengths, max_len=4096, seed=1)
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
    """Run and simulate each workload, and print both."""
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
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[128, 512], help="pool sizes, multiples of 32")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--device", default="cpu.json")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    if options.what == "fill":
        print(json.dumps(fill(EngineConfig.from_options(json.loads(options.models[0])))))
    elif options.what == "memory":
        memory(options.models, options.num_blocks)
    else:
        for model in options.models:
            speed(model, options.dtype, options.quantization, options.device, options.repeats)


if __name__ == "__main__":
    main()
