"""Tokens per CPU second of Quire and llama.cpp from the same GGUF files, one thread each, in turns.

    python -m benchmarks.gguf_peers M160-Q4_0.gguf --llama DIR/llama.cpp/build/bin --rounds 3

`benchmarks.rates` says what a rate is.
"""

import argparse
import os
import resource
import subprocess
import time
from pathlib import Path

import numpy as np

from benchmarks.rates import (
    LONG,
    NUM_STREAMS,
    PREFILL,
    PREFILL_TOKENS,
    PROMPT_TOKENS,
    SHORT,
    STREAM,
    STREAMS,
    Rate,
    print_in_turns,
    rates_of,
)
from quire import LLM, SamplingParams

RATES = (STREAM, STREAMS, PREFILL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf_peers", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--llama", type=Path, required=True, help="folder with llama-bench and llama-batched-bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RATES, default=RATES, metavar="RATE", help=", ".join(RATES))
    options = parser.parse_args()
    for file in options.files:
        ours, theirs = quire_rates(file), llama_rates(file, options.llama)
        for name in options.only:
            rates = {"Quire": ours[name], "llama.cpp": theirs[name]}
            print_in_turns(f"{file.name}, {name}", rates, options.rounds)


def quire_rates(file: Path) -> dict[str, Rate]:
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

    run(NUM_STREAMS, PROMPT_TOKENS, 4)
    return rates_of(run)


def llama_rates(file: Path, programs: Path) -> dict[str, Rate]:
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
