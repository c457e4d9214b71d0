"""Cost of three viewers of the KV pool: `python -m benchmarks.viewers [--num-blocks 16384 --requests 64]`.

Runs steps of the bundled model in this process, and between them what the engine process does while somebody looks:
it compares the pool and encodes what changed. What the API process does for each viewer is timed as well. Prints both
as shares of the time of the steps, from the first look on. Time is CPU time of this thread with one kernel thread, so that other programs on the
machine count as little as they can.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec

from quire import EngineConfig, SamplingParams
from quire.engine.engine import Engine
from quire.engine.pool_views import PoolViews
from quire.engine.pool_watch import PoolWatch
from quire.server.kv import encode_frame

PROMPT, CONTEXT = 64, 1000


class Clock:
    """CPU seconds of this thread by what they were spent on."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(("steps", "engine", "viewers"), 0.0)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        started = time.thread_time()
        try:
            yield
        finally:
            self.spent[what] += time.thread_time() - started


async def measure(num_blocks: int, num_requests: int, num_viewers: int, seconds: float) -> dict[str, Any]:
    """Shares of the steps' time, looks a second and bytes sent to a viewer."""
    config = EngineConfig.from_options({"num_blocks": num_blocks, "threads": 1})
    engine = Engine(config, lambda line: None)
    core: Any = engine._core  # a server's engine process has a core alone
    metrics = SimpleNamespace(latencies={})
    views = PoolViews(lambda message: None, SimpleNamespace(state="ready", stats=core.stats(), metrics=metrics))  # type: ignore[arg-type]
    viewers = [views.open() for _ in range(num_viewers)]
    watch = core.watch = PoolWatch(core._scheduler)
    params = SamplingParams(max_tokens=CONTEXT - PROMPT, ignore_eos=True, detokenize=False)
    clock, looks, sent, added = Clock(), 0, 0, 0
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        for _ in range(num_requests - core.stats().num_running - core.stats().num_waiting):
            engine.add_request(f"{added}", [3 + (added * 7 + at) % 200 for at in range(PROMPT)], params)
            added += 1
        with clock.of("steps"):
            engine.step()
        with clock.of("engine"):
            watch.note_work()
            change = watch.look()
            data = b"" if change is None else msgspec.msgpack.encode(change)
        if not data:
            continue
        if not looks:  # the first look sends the whole pool, once
            clock.spent = dict.fromkeys(clock.spent, 0.0)
        looks += 1
        with clock.of("viewers"):
            views.apply(msgspec.msgpack.decode(data, type=type(change)))
            sent += sum([len(encode_frame(await viewer.next())) for viewer in viewers])
    passed = time.monotonic() - started
    steps, of_engine, of_viewers = clock.spent.values()
    engine.close()
    return {
        "num_blocks": num_blocks,
        "requests": num_requests,
        "viewers": num_viewers,
        "engine_pct_of_steps": 100 * of_engine / steps,
        "api_pct_of_steps": 100 * of_viewers / steps,
        "looks_per_second": looks / passed,
        "bytes_per_second_and_viewer": sent / passed / num_viewers,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-blocks", type=int, default=16_384)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--viewers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    figures = asyncio.run(measure(given.num_blocks, given.requests, given.viewers, given.seconds))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
