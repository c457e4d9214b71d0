"""Chaos: streams of every kind while the engine process is killed, stopped and starved; each answer is checked.

    python -m benchmarks.chaos --minutes 15 --every 20 --streams 40

Every kind of request is answered once without faults. Then many streams repeat the kinds at random, faults come at
random times, and every answer must equal the first. Printed are the answers that were lost, that were wrong, and the
pauses that the streams saw.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from quire import AsyncLLM, EngineConfig, RequestOutput, SamplingParams
from quire.errors import QuireError
from quire.structured_outputs import StructuredOutputsParams

PREFIX = list(range(5, 105))
PROMPTS = ("ROMEO:", "First Citizen:\nBefore we proceed any further, hear me speak.\n", "What say you? " * 30)
GREEDY = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
DATE = StructuredOutputsParams(regex="[0-9]{4}-[0-9]{2}-[0-9]{2}( and [a-z ]{10,60})")
KINDS: dict[str, SamplingParams] = {
    "greedy": GREEDY,
    "seeded": GREEDY.with_changes(temperature=1.0, seed=7),
    "samples": GREEDY.with_changes(temperature=1.0, seed=8, n=3, max_tokens=60),
    "best": GREEDY.with_changes(temperature=1.0, seed=9, n=1, best_of=3, max_tokens=60),
    "beams": GREEDY.with_changes(beam_width=3, max_tokens=40),
    "grammar": GREEDY.with_changes(structured_outputs=DATE, max_tokens=80, ignore_eos=False),
    "stop": GREEDY.with_changes(temperature=1.0, seed=3, stop=["e the"], logprobs=2),
    "prompt scores": GREEDY.with_changes(prompt_logprobs=1, max_tokens=30),
}
FAULTS = ("kill", "kill", "segv", "stop", "two kills")


@dataclass
class Tally:
    """What the streams saw."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    faults: int = 0
    gaps: list[float] = field(default_factory=list)
    """The longest pause of each stream that saw a fault, in seconds."""

    def __str__(self) -> str:
        gaps = sorted(self.gaps) or [0.0]
        return (
            f"{self.faults} faults, {self.right} answers right, {len(self.wrong)} wrong, {len(self.lost)} lost; "
            f"pause p50 {gaps[len(gaps) // 2]:.2f} s, p99 {gaps[len(gaps) * 99 // 100]:.2f} s"
        )


async def ask(engine: AsyncLLM, kind: str, prompt: Any) -> tuple[RequestOutput, float]:
    """The whole answer, and the longest time between two of its parts."""
    total: RequestOutput | None = None
    last, gap = time.monotonic(), 0.0
    async for delta in engine.generate(prompt, KINDS[kind]):
        now = time.monotonic()
        last, gap = now, max(gap, now - last)
        if total is None:
            total = delta
        else:
            total.extend(delta)
    assert total is not None
    return total, gap


def essence(output: RequestOutput) -> object:
    """What must be equal whenever a request is answered."""
    return [(sample.index, sample.token_ids, sample.text, sample.finish_reason) for sample in output.outputs]


async def stream(engine: AsyncLLM, expected: dict[tuple[str, int], object], tally: Tally, until: float) -> None:
    """Ask one request after the other."""
    while time.monotonic() < until:
        kind, index = random.choice(list(expected))
        before = tally.faults
        try:
            output, gap = await ask(engine, kind, [*PREFIX, 7] if index < 0 else PROMPTS[index])
        except QuireError as error:
            tally.lost.append(f"{kind}: {error}")
            await asyncio.sleep(1.0)
            continue
        if tally.faults > before:
            tally.gaps.append(gap)
        if essence(output) == expected[kind, index]:
            tally.right += 1
        else:
            tally.wrong.append(f"{kind}, prompt {index}: {essence(output)} instead of {expected[kind, index]}")


async def break_down(engine: AsyncLLM, tally: Tally, every: float, until: float) -> None:
    """One fault after the other, `every` seconds apart on average."""
    while (pause := every * random.uniform(0.5, 1.5)) < until - time.monotonic():
        await asyncio.sleep(pause)
        fault, pid = random.choice(FAULTS), engine.engine_pid
        tally.faults += 1
        try:
            os.kill(pid, {"stop": signal.SIGSTOP, "segv": signal.SIGSEGV}.get(fault, signal.SIGKILL))
            if fault == "two kills":
                while engine.engine_pid == pid:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(random.uniform(0.0, 0.5))
                os.kill(engine.engine_pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


async def chaos(*, seconds: float, every: float, streams: int, **options: Any) -> Tally:
    """Run streams under faults for `seconds`."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        given = {"swap_space": "8MiB", "disk_cache": folder, "speculative_config": {"method": "ngram"}, **options}
        engine = AsyncLLM(EngineConfig.from_options({"disable_log_stats": True, "step_timeout": 2.0, **given}))
        await engine.start()
        try:
            await engine.wait_ready()
            await engine.register_prefix(PREFIX)
            expected: dict[tuple[str, int], object] = {}
            for kind in KINDS:
                for index in range(-1, len(PROMPTS)):
                    prompt = [*PREFIX, 7] if index < 0 else PROMPTS[index]
                    expected[kind, index] = essence((await ask(engine, kind, prompt))[0])
            until = time.monotonic() + seconds
            await asyncio.gather(
                break_down(engine, tally, every, until),
                *(stream(engine, expected, tally, until) for _ in range(streams)),
            )
            while engine.stats.num_running:
                await asyncio.sleep(0.05)
        finally:
            await engine.shutdown()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two faults")
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    tally = asyncio.run(
        chaos(seconds=60 * given.minutes, every=given.every, streams=given.streams, threads=given.threads)
    )
    print("\n".join([*tally.wrong[:5], *tally.lost[:5], str(tally)]))
    return 1 if tally.wrong or tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
