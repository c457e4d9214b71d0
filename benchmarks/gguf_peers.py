"""Tokens per CPU second of Quire and llama.cpp from the same GGUF files, one thread each, in turns.

    python -m benchmarks.gguf_peers M160-Q4_0.gguf --llama DIR/llama.cpp/build/bin --rounds 3

CPU seconds, unlike seconds, mean the same on a machine that other work shares. Each rate is the difference of two runs
of different lengths, so loading and warming up do not count.
"""

import argparse
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quire import LLM, SamplingParams

STREAM, STREAMS, PREFILL = "one stream", "16 streams", "prefill of 2,048"
NUM_STREAMS = 16
PROMPT_TOKENS, PREFILL_TOKENS = 16, 2048
LONG, SHORT = 48, 16
"""Output tokens of the two runs."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf_peers", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--llama", type=Path, required=True, help="folder with llama-bench and llama-batched-bench")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for file in options.files:
        ours, theirs = quire_rates(file), llama_rates(file, options.llama)
        for name in (STREAM, STREAMS, PREFILL):
            pairs = [(ours[name](), theirs[name]()) for _ in range(options.rounds)]
            rates = [statistics.median(pair[side] for pair in pairs) for side in (0, 1)]
            ratio = statistics.median(a / b for a, b in pairs)
            print(
                f"{file.name}, {name}: Quire {rates[0]:.1f}, llama.cpp {rates[1]:.1f} tokens per CPU second, "
                f"ratio {ratio:.2f}; load average {os.getloadavg()[0]:.1f}",
                flush=True,
            )


def quire_rates(file: Path) -> dict[str, Callable[[], float]]:
    """Name → a function that measures Quire's rate. The model stays loaded."""
    llm = LLM(
        str(file), threads=1, max_num_seqs=NUM_STREAMS, max_model_len=PREFILL_TOKENS + 256, enable_prefix_caching=False
    )
    draw = np.random.default_rng(0)

    def run(num_prompts: int, num_tokens: int, num_outputs: int) -> float:
        prompts = [{"prompt_token_ids": draw.integers(5, 1000, num_tokens).tolist()} for _ in range(num_prompts)]
        params = SamplingParams(max_tokens=num_outputs, ignore_eos=True, temperature=0.0)
        began = time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        return time.process_time() - began

    def decode(num_prompts: int) -> float:
        longer, shorter = (run(num_prompts, PROMPT_TOKENS, num_outputs) for num_outputs in (LONG, SHORT))
        return num_prompts * (LONG - SHORT) / (longer - shorter)

    run(NUM_STREAMS, PROMPT_TOKENS, 4)
    return {
        STREAM: lambda: decode(1),
        STREAMS: lambda: decode(NUM_STREAMS),
        PREFILL: lambda: PREFILL_TOKENS / run(1, PREFILL_TOKENS, 1),
    }


def llama_rates(file: Path, programs: Path) -> dict[str, Callable[[], float]]:
    """Name → a function that measures llama.cpp's rate, loading the file each time."""
    bench = [programs / "llama-bench", "-m", file, "-t", "1", "-r", "1", "--no-warmup"]
    batched = [programs / "llama-batched-bench", "-m", file, "-t", "1", "-tb", "1", "-c", "4096", "-b", "2048"]
    batched += ["-ub", "512", "-npp", str(PROMPT_TOKENS), "-npl", str(NUM_STREAMS)]

    def decode(command: list[object], flag: str, num_streams: int) -> float:
        longer, shorter = (cpu_seconds([*command, flag, number]) for number in (LONG, SHORT))
        return num_streams * (LONG - SHORT) / (longer - shorter)

    def prefill() -> float:
        longer, shorter = (cpu_seconds([*bench, "-n", "0", "-p", number]) for number in (PREFILL_TOKENS, 1))
        return PREFILL_TOKENS / (longer - shorter)

    return {
        STREAM: lambda: decode([*bench, "-p", "0"], "-n", 1),
        STREAMS: lambda: decode(list(batched), "-ntg", NUM_STREAMS),
        PREFILL: prefill,
    }


def cpu_seconds(command: list[object]) -> float:
    """CPU seconds that a program takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    subprocess.run(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
