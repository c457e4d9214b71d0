"""Gain of the tiers below the pool: a restart with a disk tier, preemption with each tier, and load against compute.

`python -m benchmarks.tiers MODEL [--dtype float32] [--load-format dummy] [--prompt 2048] [--only crossover]` prints
JSON. MODEL is the folder of a checkpoint whose context holds the prompt. The disk tier is in a temporary folder. Each
figure of a restart is the median over several engines. The system's file cache holds the blocks, so the disk itself is
not measured: it adds `bytes_per_block` over its rate. The crossover is measured with a store throttled to one rate
after another.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.llm import LLM
from quire.sampling_params import SamplingParams

FIRST_TOKEN, LAST_TOKEN = 3, 250
POOL_SEQUENCES, NUM_REQUESTS = 3, 64
RATES = (5, 10, 20, 40, 80)
"""MB/s that a throttled disk reads."""
PREEMPTED_PROMPT, PREEMPTED_OUTPUT = 64, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("restart", "crossover", "preemption"))
    options = parser.parse_args()
    engine: dict[str, Any] = {"model": options.model, "dtype": options.dtype, "load_format": options.load_format}
    parts: dict[str, Callable[[], Any]] = {
        "restart": lambda: restart(engine, options.prompt, options.repeats),
        "crossover": lambda: crossover(engine, options.prompt // 4, options.repeats),
        "preemption": lambda: {name: preemption(engine, name) for name in ("none", "host", "disk", "both")},
    }
    print(json.dumps({name: run() for name, run in parts.items() if options.only in (None, name)}, indent=2))


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(num_tokens)]


def restart(engine: dict[str, Any], num_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first token of a long prompt in a new engine: computed, and loaded from stored blocks.

    A short request runs first, so that neither pays for first calls.
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
            "longest_close_s": round(flush_seconds, 3),
        }


def crossover(engine: dict[str, Any], num_tokens: int, repeats: int) -> list[dict[str, float]]:
    """Seconds to the first token of a stored prompt, by the rate of the disk: loaded, computed, and as the engine
    chooses."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    prompt, rows = prompt_of(num_tokens, seed=0), []
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(**engine, num_blocks=num_tokens // 8, max_num_seqs=8, disk_cache=folder) as llm,
    ):
        core: Any = llm._engine._core
        scheduler, store = core._scheduler, core._executor._block_store
        index, files = scheduler._tiers, store._disk if store is not None else None
        assert index is not None
        assert files is not None
        decide, read = index.num_worth_loading, files._read_file
        rate = float("inf")

        def read_throttled(block_hash: bytes, buffer: bytearray) -> str | None:
            started = time.perf_counter()
            reason: str | None = read(block_hash, buffer)
            time.sleep(max(0.0, len(buffer) / (rate * 1e6) - (time.perf_counter() - started)))
            return reason

        def first_token(way: str) -> float:
            scheduler.pool.clear_hashes()
            index.num_worth_loading = {  # force the choice, to measure it
                "loaded": lambda stored_in, *_: len(stored_in),
                "computed": lambda *_: 0,
                "chosen": decide,
            }[way]
            started = time.perf_counter()
            llm.generate([prompt], params, use_tqdm=False)
            return time.perf_counter() - started

        files._read_file = read_throttled
        for _ in range(2):
            llm.generate([prompt], params, use_tqdm=False)
        while core.has_idle_work:
            core.step()
        for rate in RATES:
            seconds: dict[str, list[float]] = {"loaded": [], "computed": [], "chosen": []}
            loaded_before = 0
            for _ in range(repeats):
                for way, found in seconds.items():
                    loaded_before = llm.stats().tiers["disk"].total_loaded
                    found.append(first_token(way))
            rows.append(
                {"disk_MB_per_s": rate}
                | {f"{way}_s": round(statistics.median(found), 3) for way, found in seconds.items()}
                | {"chosen_to_load": llm.stats().tiers["disk"].total_loaded - loaded_before}
            )
    return [{"prompt_tokens": num_tokens, "blocks": (num_tokens - 1) // 16, **row} for row in rows]


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
