"""Measure prefill and decode apart: streams that decode while a long prompt arrives, with a server for prompts and one
for answers, and with the same two servers for both.

    python -m benchmarks.prefill_apart MODEL --rounds 6

Both routers stand in front of the same servers and are used in turns. Servers compute on one thread each.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cluster import Times, stream
from tests.router.processes import Process

NEIGHBOURS, PORT = 4, 14580


def servers(model: str, folder: Path, stack: ExitStack) -> tuple[Process, Process]:
    """A server that gives blocks and one that fetches them."""
    (folder / "key").write_text("0123456789abcdef" * 2)
    roles: list[dict[str, Any]] = [
        {"kv_role": "kv_producer", "kv_port": PORT},
        {"kv_role": "kv_consumer", "kv_peers": [f"127.0.0.1:{PORT}"]},
    ]
    started = []
    for number, role in enumerate(roles):
        transfer = json.dumps({**role, "kv_key_file": str(folder / "key")})
        options = ("--threads", "1", "--kv-cache-memory", "600MiB", "--disk-cache", str(folder / f"tier-{number}"))
        started.append(stack.enter_context(Process("serve", model, *options, "--kv-transfer-config", transfer)).start())
    for each in started:
        each.await_ready()
    return started[0], started[1]


async def one_round(client: httpx.AsyncClient, url: str, num_tokens: int, seed: int) -> tuple[list[float], Times]:
    """Seconds between tokens of the neighbours while a prompt of `num_tokens` is computed, and that prompt's times."""
    rng = random.Random(seed)
    gaps: list[float] = []
    arrived = asyncio.Event()
    done = asyncio.Event()

    async def neighbour(number: int) -> None:
        while not done.is_set():
            times = await stream(client, url, f"{seed} {number} once upon a time", 60)
            if arrived.is_set():
                gaps.extend(times.gaps)

    tasks = [asyncio.create_task(neighbour(number)) for number in range(NEIGHBOURS)]
    await asyncio.sleep(3.0)
    arrived.set()
    long_prompt: Any = [rng.randrange(3, 900) for _ in range(num_tokens)]
    times = await stream(client, url, long_prompt, 20)
    done.set()
    await asyncio.gather(*tasks)
    return gaps, times


async def measure(urls: dict[str, str], rounds: int, num_tokens: int) -> None:
    gaps: dict[str, list[list[float]]] = {name: [] for name in urls}
    firsts: dict[str, list[float]] = {name: [] for name in urls}
    async with httpx.AsyncClient(timeout=600) as client:
        for number in range(rounds + 1):
            for name in urls if number % 2 else reversed(urls):
                found, times = await one_round(client, urls[name], num_tokens, 2 * number + (name == "apart"))
                if number:  # the first round opens connections and files
                    gaps[name].append(found)
                    firsts[name].append(times.first)
                    cached = f"{times.cached_tokens} of {times.prompt_tokens} tokens cached"
                    print(f"{name}: TTFT {times.first:.2f} s, {cached}, {_describe(found)}", flush=True)
    for name in urls:
        everything = [gap for found in gaps[name] for gap in found]
        print(f"{name}: TTFT p50 {statistics.median(firsts[name]):.2f} s; neighbours {_describe(everything)}")


def _describe(gaps: list[float]) -> str:
    ordered = sorted(gaps)
    p50, p99 = (1e3 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
    return f"{len(gaps)} gaps, p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {1e3 * ordered[-1]:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=3000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, ExitStack() as stack:
        prompts, answers = servers(asked.model, Path(folder), stack)
        routers = {
            "together": ("--backends", f"{prompts.url},{answers.url}"),
            "apart": ("--prefill", prompts.url, "--decode", answers.url),
        }
        started = {name: stack.enter_context(Process("router", *options)).start() for name, options in routers.items()}
        for each in started.values():
            each.await_ready()
        asyncio.run(measure({name: each.url for name, each in started.items()}, asked.rounds, asked.tokens))


if __name__ == "__main__":
    main()
