"""What a GPU does, against what it could: kernels, decode and a serving workload of two published shapes, transformers.

    python -m benchmarks.gpu [--models 0.6B 8B] [--skip-transformers]

With `--models` and no name after it, the kernels alone.

One run, one table, the card named; the ceilings are measured in the same run. Weights are random (load_format=dummy) in
the shapes of Qwen3-0.6B and Llama-3.1-8B, in bfloat16; sequences ignore end tokens, so that every run does the
same work.
Each figure is the best of REPEATS runs after one to warm up. Without a CUDA device it says so and measures nothing.
"""

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kernels import Figure, kernel_figures
from quire import LLM, SamplingParams
from quire.runner.cuda_graphs import GraphKey, Outcome

REPEATS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
"""As published, without the stretch of rotary positions, which costs nothing."""
DECODE_TARGETS = {"0.6B": {1: (1_600, 3_284), 256: (23_000, 35_200)}, "8B": {1: (215, 284), 256: (15_000, 22_300)}}
"""Tokens a second with 1k of context on an H200: what is aimed at, and what its memory allows."""
WORKLOAD_TARGETS = {"0.6B": (20_000, 36_100), "8B": (9_500, 14_100)}
CONTEXT, DECODE_STEPS = 1024, 128
MODEL_LEN = 2304


def write_shape(folder: Path, shape: dict[str, Any]) -> Path:
    """A model folder with a config.json and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_rate(llm: LLM, batch: int, context: int, num_steps: int) -> float:
    """Tokens a second while `batch` sequences decode around `context` tokens: the time of the prompts is taken off."""
    rng = random.Random(0)
    start = context - num_steps // 2
    prompts = [[rng.randrange(1000) for _ in range(start)] for _ in range(batch)]

    def seconds(num_tokens: int) -> float:
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - started

    seconds(num_steps)
    capture_graphs(llm)
    return max(batch * (num_steps - 1) / (seconds(num_steps) - seconds(1)) for _ in range(REPEATS))


def capture_graphs(llm: LLM) -> None:
    """What serving does when it has nothing else to do."""
    core: Any = llm._engine._core  # what serves no request has no interface
    while core.has_idle_work:
        core.step()


def workload_rate(llm: LLM, num_sequences: int = 256, longest: int = 1024) -> float:
    """Output tokens a second of nano-vllm's workload: 100 to 1,024 tokens in, as many out, all at once."""
    rng = random.Random(0)
    shortest = min(100, longest)
    prompts = [[rng.randrange(1000) for _ in range(rng.randint(shortest, longest))] for _ in range(num_sequences)]
    params = [
        SamplingParams(temperature=0.6, max_tokens=rng.randint(shortest, longest), ignore_eos=True, seed=index)
        for index in range(num_sequences)
    ]
    num_tokens = sum(one.max_tokens or 0 for one in params)
    rates = []
    for _ in range(1 + REPEATS):
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        capture_graphs(llm)
        rates.append(num_tokens / (time.perf_counter() - started))
    return max(rates)


def exposed_host_time(llm: LLM, rate: float, batch: int) -> float | None:
    """Seconds of a decode step in which the GPU waits for the host: its time less that of its graph alone."""
    runner: Any = llm._engine._core._runner  # what serves no request has no interface
    graphs = getattr(runner._graphs, "_graphs", {})
    keys: list[GraphKey] = [key for key in graphs if key.size == batch and key.outcome is Outcome.TOKENS]
    if not keys:
        return None
    graph, _ = graphs[min(keys)]  # without shared keys, if there are several
    return batch / rate - best_seconds(graph.replay, torch.device("cuda"))


def transformers_rates(folder: Path, batch: int, context: int, num_steps: int) -> dict[str, float]:
    """Output tokens a second of transformers' `generate` and `generate_batch`, on the same card with the same shape."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(context)] for _ in range(batch)]
    generation = GenerationConfig(
        max_new_tokens=num_steps, min_new_tokens=num_steps, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids = torch.tensor(prompts, device="cuda")
    rates = {}
    ways: dict[str, Callable[[], object]] = {
        "generate": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation),
        "generate_batch": lambda: model.generate_batch(inputs=prompts, generation_config=generation),
    }
    for name, run in ways.items():
        try:
            rates[name] = batch * num_steps / best_seconds(run, torch.device("cuda"), repeats=1)
        except Exception as error:
            print(f"transformers' {name} failed: {type(error).__name__}: {error}")
    return rates


def measure_model(name: str, folder: Path, *, with_transformers: bool) -> list[Figure]:
    llm = LLM(str(folder), device="cuda", load_format="dummy", max_model_len=MODEL_LEN, max_num_seqs=256, verbose=True)
    rows = []
    for batch, (target, limit) in DECODE_TARGETS[name].items():
        rate = decode_rate(llm, batch, CONTEXT, DECODE_STEPS)
        rows.append(
            Figure(f"{name} decode, batch {batch}, 1k context", f"{rate:,.0f} tok/s", f"{target:,}", f"{limit:,}")
        )
        if batch == 256:
            exposed = exposed_host_time(llm, rate, batch)
            shown = "no graph" if exposed is None else f"{1e3 * exposed:.2f} ms"
            rows.append(Figure(f"{name} exposed host time, batch 256", shown, "0.2 ms", "0"))
    target, limit = WORKLOAD_TARGETS[name]
    rate = workload_rate(llm)
    rows.append(
        Figure(f"{name} 256 sequences of 100–1,024 in and out", f"{rate:,.0f} tok/s", f"{target:,}", f"{limit:,}")
    )
    if with_transformers:
        batch, context, num_steps = 64, 512, 128
        rng = random.Random(0)
        prompts = [[rng.randrange(1000) for _ in range(context)] for _ in range(batch)]
        params = SamplingParams(temperature=0.0, max_tokens=num_steps, ignore_eos=True)
        llm.reset_prefix_cache()
        llm.generate(prompts, params, use_tqdm=False)
        capture_graphs(llm)
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        own = batch * num_steps / (time.perf_counter() - started)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        for way, other in transformers_rates(folder, batch, context, num_steps).items():
            target_times = {"generate": "10×", "generate_batch": "3×"}[way]
            rows.append(
                Figure(f"{name} against transformers' {way} ({other:,.0f} tok/s)", f"{own / other:.1f}×", target_times)
            )
    return rows


def table(title: str, rows: list[Figure]) -> str:
    lines = [f"{title}\n", "| figure | measured | target | limit |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.what} | {row.measured} | {row.target} | {row.limit} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one GPU; targets and limits are an H200's.")
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--skip-transformers", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: not measured")
        return
    rows = kernel_figures()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            shape = write_shape(Path(folder) / name, SHAPES[name])
            rows += measure_model(name, shape, with_transformers=not options.skip_transformers)
            gc.collect()
            torch.cuda.empty_cache()
    print(table(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; targets and limits are an H200's", rows))


if __name__ == "__main__":
    main()
