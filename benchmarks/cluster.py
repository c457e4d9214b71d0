"""Measure a cluster that runs: what Ray adds to a server's times, the memory of Ray's processes, and agents.

    quire cluster serve --replicas 2 --num-cpus 0.5 --threads 1 --port 8000
    python -m benchmarks.cluster http://127.0.0.1:8000 --overhead 20
    python -m benchmarks.cluster http://127.0.0.1:8000 --sessions 8 --turns 12

The overhead compares a stream through Ray's proxy and the router with one from a replica itself, in turns. Agents hold
conversations that grow with each turn; several run at once.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

WORDS = "To be or not that is the question whether tis nobler in mind suffer slings and arrows of outrageous".split()  # noqa: SIM905
NUM_TOKENS = 100


@dataclass
class Times:
    """One stream."""

    first: float = 0.0
    """Seconds to the first token."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between two events."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""


async def stream(client: httpx.AsyncClient, url: str, prompt: str, max_tokens: int) -> Times:
    """Ask for a completion, and time its events."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    times, last = Times(), time.perf_counter()
    async with client.stream(
        "POST", f"{url}/v1/completions", json={**body, "stream_options": {"include_usage": True}}
    ) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line[6:])
            now = time.perf_counter()
            if event["choices"]:
                times.text += event["choices"][0]["text"]
                times.gaps.append(now - last)
                last = now
            else:
                times.prompt_tokens = event["usage"]["prompt_tokens"]
                times.cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    times.first = times.gaps.pop(0)
    return times


async def overhead(client: httpx.AsyncClient, url: str, num_pairs: int) -> None:
    """Print what a stream through `url` takes more than one from a replica, in pairs that alternate."""
    replica = (await client.get(f"{url}/router")).json()["replicas"][0]["url"]
    pairs = []
    for number in range(num_pairs + 1):
        order = [url, replica] if number % 2 else [replica, url]
        took = {each: await stream(client, each, f"{number} " + " ".join(WORDS), NUM_TOKENS) for each in order}
        pairs.append((took[url], took[replica]))
    pairs = pairs[1:]  # the first one opens connections
    figures: tuple[tuple[str, Callable[[Times], float]], ...] = (
        ("TTFT", lambda times: times.first),
        ("per token", lambda times: sum(times.gaps) / len(times.gaps)),
    )
    for name, value in figures:
        through, direct = ([1e3 * value(pair[side]) for pair in pairs] for side in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(through, direct, strict=True))
        difference = statistics.median(a - b for a, b in zip(through, direct, strict=True))
        print(
            f"{name}: {statistics.median(through):.1f} ms through Ray, {statistics.median(direct):.1f} ms direct, "
            f"median ratio {ratio:.2f}, median difference {difference:.1f} ms"
        )


async def agents(client: httpx.AsyncClient, url: str, sessions: int, turns: int, seed: int) -> None:
    """Print latency and hits of conversations that run at once."""
    before = {each["url"]: each["total_tokens"] for each in (await client.get(f"{url}/router")).json()["replicas"]}

    async def converse(number: int) -> list[Times]:
        draw, history, done = random.Random(f"{seed} {number}"), f"Session {seed} {number}.", []
        for _ in range(turns):
            history += " " + " ".join(draw.choices(WORDS, k=40))
            times = await stream(client, url, history, 16)
            history += times.text
            done.append(times)
            await asyncio.sleep(draw.expovariate(2.0))
        return done

    all_turns = [each for done in await asyncio.gather(*map(converse, range(sessions))) for each in done]
    first = sorted(1e3 * each.first for each in all_turns)
    hits = sum(each.cached_tokens for each in all_turns) / sum(each.prompt_tokens for each in all_turns)
    state = (await client.get(f"{url}/router")).json()
    work = [each["total_tokens"] - before.get(each["url"], 0) for each in state["replicas"]]
    print(
        f"{len(all_turns)} turns, longest prompt {max(each.prompt_tokens for each in all_turns)} tokens: TTFT p50 "
        f"{first[len(first) // 2]:.0f} ms, p99 {first[len(first) * 99 // 100]:.0f} ms, hits {100 * hits:.1f} %, "
        f"work {work}"
    )


def memory() -> dict[str, float]:
    """MiB of each process of Ray on this machine, its share of shared pages included once. Replicas and the router
    are left out."""
    found: dict[str, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            lines = (folder / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        is_ray = command.startswith("ray::") or "site-packages/ray/" in command.partition(" --")[0]
        if is_ray and "ServeReplica" not in command:
            name = command.split()[0] if command.startswith("ray::") else Path(command.partition(" --")[0]).name
            pss = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            found[name] = found.get(name, 0.0) + pss / 1024
    return found


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--overhead", type=int, default=0, help="pairs of streams")
    parser.add_argument("--sessions", type=int, default=0)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given: Any = parser.parse_args()
    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        if given.overhead:
            await overhead(client, given.url, given.overhead)
        if given.sessions:
            await agents(client, given.url, given.sessions, given.turns, given.seed)
    sizes = memory()
    print(
        f"Ray's own processes: {sum(sizes.values()):.0f} MiB { ({name: round(size) for name, size in sizes.items()}) }"
    )
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
