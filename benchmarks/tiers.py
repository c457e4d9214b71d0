"""What the tiers below the pool bring: a restart with a disk tier, preemption with each, and load against compute.

`python -m benchmarks.tiers MODEL [--dtype float32] [--load-format dummy] [--prompt 2048]` prints JSON. MODEL is the
folder of a checkpoint whose context holds the prompt; a disk tier is put into a folder that is removed afterwards. Each
figure of a restart is the median over engines of their own, of which the file cache of the system knows the blocks: the
disk itself is not measured, what it adds is `bytes_per_block` over its rate.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from quire.llm import LLM
from quire.sampling_params import SamplingParams

FIRST_TOKEN, LAST_TOKEN = 3, 250
POOL_SEQUENCES, NUM_REQUESTS = 3, 64
PREEMPTED_PROMPT, PREEMPTED_OUTPUT = 64, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    engine: dict[str, Any] = {"model": options.model, "dtype": options.dtype, "load_format": options.load_format}
    figures = {
        "restart": restart(engine, options.prompt, options.repeats),
        "preemption": {name: preemption(engine, name) for name in ("none", "host", "disk", "both")},
    }
    print(json.dumps(figures, indent=2))


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(num_tokens)]


def restart(engine: dict[str, Any], num_tokens: int, repeats: int) -> dict[str, Any]:
    """First token of a long prompt in a new engine: computed, and from what an earlier engine stored.

    A short request comes first, so that neither pays for first calls.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    engine = {**engine, "num_blocks": num_tokens // 8, "max_num_seqs": 8}
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, list[float]] = {"cold": [], "hit": []}
        tokens = set()
        stats: Any = None
        flush_seconds = 0.0
        for number in range(-1, repeats):
            with LLM(**engine, disk_cache=folder) as llm:
                for kind, seed in (("hit", 0), ("cold", 1 + number)):
                    if number < 0 and kind == "cold":
                        continue
                    llm.generate([prompt_of(40, seed=10_000)], params, use_tqdm=False)
                    started = time.perf_counter()
                    (output,) = llm.generate([prompt_of(num_tokens, seed)], params, use_tqdm=False)
                    if kind == "hit":
                        tokens.add(output.outputs[0].token_ids[0])
                    if number >= 0:
                        seconds[kind].append(time.perf_counter() - started)
                stats = llm.stats().tiers["disk"]
                started = time.perf_counter()
            flush_seconds = max(flush_seconds, time.perf_counter() - started)
        if len(tokens) > 1:
            raise RuntimeError(f"a hit changed the first token: {tokens}")
        bytes_per_block = stats.total_loaded_bytes // stats.total_loaded
        cold, hit = (statistics.median(seconds[kind]) for kind in ("cold", "hit"))
        num_blocks = (num_tokens - 1) // 16
        return {
            "prompt_tokens": num_tokens,
            "cold_s": round(cold, 4),
            "hit_s": round(hit, 4),
            "speedup": round(cold / hit, 1),
            "bytes_per_block": bytes_per_block,
            "loaded_MB_per_s": round(num_blocks * bytes_per_block / hit / 1e6),
            "computed_tokens_per_s": round(num_tokens / cold),
            # A disk that reads slower than this is left aside, and blocks are computed.
            "crossover_MB_per_s": round(num_tokens / cold / 16 * bytes_per_block / 1e6, 1),
            "longest_close_s": round(flush_seconds, 3),
        }


def preemption(engine: dict[str, Any], tiers: str) -> dict[str, Any]:
    """64 requests in a pool for three of them."""
    per_sequence = -(-(PREEMPTED_PROMPT + PREEMPTED_OUTPUT) // 16)
    options = {**engine, "num_blocks": POOL_SEQUENCES * per_sequence, "max_num_seqs": 32}
    options["max_model_len"] = PREEMPTED_PROMPT + PREEMPTED_OUTPUT
    with tempfile.TemporaryDirectory() as folder:
        if tiers in ("host", "both"):
            options["swap_space"] = "1GiB"
        if tiers in ("disk", "both"):
            options["disk_cache"] = str(Path(folder))
        with LLM(**options) as llm:
            prompts = [prompt_of(PREEMPTED_PROMPT, seed) for seed in range(NUM_REQUESTS)]
            params = SamplingParams(temperature=0.0, max_tokens=PREEMPTED_OUTPUT, ignore_eos=True)
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            stats = llm.stats()
            return {
                "seconds": round(seconds, 2),
                "preemptions": stats.total_preemptions,
                "prompt_tokens_computed": stats.total_prompt_tokens,
                "loaded_blocks": {name: tier.total_loaded for name, tier in stats.tiers.items()},
                "recomputed_blocks": {name: tier.total_recomputed for name, tier in stats.tiers.items()},
            }


if __name__ == "__main__":
    main()
