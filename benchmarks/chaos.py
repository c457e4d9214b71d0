"""Chaos: streams of every kind while the engine process is killed, stopped and starved; each answer is checked.

    python -m benchmarks.chaos --minutes 15 --every 20 --streams 40

Every kind of request is answered once without faults. Then many streams repeat the kinds at random, faults come at
random times, and every answer must equal the first. At the end the engine is killed and shut down at one moment, and
what runs must still be answered. Printed are the answers that were lost, that were wrong, and the pauses that the
streams saw.
"""

import argparse
import asyncio
import os
import random
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lora import write_adapter
from quire import AsyncLLM, EngineConfig, RequestOutput, SamplingParams
from quire.engine.checkpoint import bundled_folder
from quire.errors import QuireError
from quire.lora.registry import Adapter
from quire.model_config import ModelConfig
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
    "adapter": GREEDY.with_changes(temperature=1.0, seed=5, max_tokens=60),
    "drafts": GREEDY.with_changes(max_tokens=200),
}
FAULTS = ("kill", "kill", "segv", "stop", "stop and go on", "two kills", "no memory", "full disk")
LAST_STREAMS = 8
"""Streams that run when the engine is killed and shut down at one moment."""


@dataclass
class Tally:
    """What the streams saw."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    faults: int = 0
    gaps: list[float] = field(default_factory=list)
    """The longest pause of each stream that saw a fault, in seconds."""
    kinds: set[str] = field(default_factory=set)
    """Kinds of requests that were answered right after a fault."""
    seen: dict[str, int] = field(default_factory=dict)
    """Faults by name."""

    def __str__(self) -> str:
        gaps = sorted(self.gaps) or [0.0]
        return (
            f"{self.faults} faults {self.seen}: {self.right} answers right, {len(self.wrong)} wrong, "
            f"{len(self.lost)} lost; {len(self.kinds)} kinds saw a fault; "
            f"pause p50 {gaps[len(gaps) // 2]:.2f} s, p99 {gaps[len(gaps) * 99 // 100]:.2f} s"
        )


@dataclass(frozen=True, slots=True)
class Clients:
    """What is asked."""

    engine: AsyncLLM
    prompts: tuple[Any, ...]
    adapter: Adapter | None = None
    """For requests of the kind "adapter"."""

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if kind != "adapter" or self.adapter is not None]


async def ask(clients: Clients, kind: str, prompt: int) -> tuple[RequestOutput, float]:
    """The whole answer, and the longest time between two of its parts."""
    total: RequestOutput | None = None
    last, gap = time.monotonic(), 0.0
    adapter = clients.adapter if kind == "adapter" else None
    async for delta in clients.engine.generate(clients.prompts[prompt], KINDS[kind], adapter=adapter):
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


async def stream(clients: Clients, expected: dict[tuple[str, int], object], tally: Tally, until: float) -> None:
    """Ask one request after the other, and at least one."""
    while True:
        kind, prompt = random.choice(list(expected))
        before = tally.faults
        try:
            output, gap = await ask(clients, kind, prompt)
        except QuireError as error:
            tally.lost.append(f"{kind}: {error}")
            await asyncio.sleep(1.0)
        else:
            if tally.faults > before:
                tally.gaps.append(gap)
                tally.kinds.add(kind)
            if essence(output) == expected[kind, prompt]:
                tally.right += 1
            else:
                tally.wrong.append(f"{kind}, {prompt}: {essence(output)} instead of {expected[kind, prompt]}")
        if time.monotonic() >= until:
            return


async def break_down(engine: AsyncLLM, tally: Tally, every: float, until: float) -> None:
    """One fault after the other, on average `every` seconds after the engine could compute again."""
    while (pause := every * random.uniform(0.5, 1.5)) < until - time.monotonic():
        await asyncio.sleep(pause)
        fault, pid = random.choice(FAULTS), engine.engine_pid
        tally.faults += 1
        tally.seen[fault] = tally.seen.get(fault, 0) + 1
        with suppress(ProcessLookupError):
            await inflict(fault, pid, engine)
        await asyncio.sleep(1.0)  # until the fault is noticed
        while engine.state != "ready" and time.monotonic() < until:
            await asyncio.sleep(0.05)


async def inflict(fault: str, pid: int, engine: AsyncLLM) -> None:
    """Do something bad to the engine process."""
    match fault:
        case "stop" | "stop and go on":
            os.kill(pid, signal.SIGSTOP)
            if fault == "stop and go on":  # sometimes before the watchdog ends it, sometimes after
                await asyncio.sleep(random.uniform(0.5, 4.0))
                os.kill(pid, signal.SIGCONT)
        case "no memory":  # every larger allocation fails from now on
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        case "full disk":  # files may not grow beyond this
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
        case "two kills":
            os.kill(pid, signal.SIGKILL)
            while engine.engine_pid == pid:
                await asyncio.sleep(0.01)
            await asyncio.sleep(random.uniform(0.0, 0.5))
            os.kill(engine.engine_pid, signal.SIGKILL)
        case _:
            os.kill(pid, signal.SIGSEGV if fault == "segv" else signal.SIGKILL)


async def kill_and_shut_down(clients: Clients, expected: dict[tuple[str, int], object], tally: Tally) -> None:
    """Kill the engine at the moment of its shutdown, which still waits for what runs."""
    streams = [asyncio.create_task(stream(clients, expected, tally, 0.0)) for _ in range(LAST_STREAMS)]
    while not clients.engine.stats.num_running:
        await asyncio.sleep(0.01)
    os.kill(clients.engine.engine_pid, signal.SIGKILL)
    await clients.engine.shutdown(drain_seconds=300.0)
    await asyncio.gather(*streams)


async def chaos(
    *, seconds: float, every: float, streams: int, prompts: tuple[Any, ...] | None = None, **options: Any
) -> Tally:
    """Run streams under faults for `seconds`. With `prompts` of one's own, a model in `options` and no adapter."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        given = {"swap_space": "8MiB", "disk_cache": folder, "speculative_config": {"method": "ngram"}, **options}
        adapter: Adapter | None = None
        if prompts is None:
            write_adapter(Path(folder) / "adapter", ModelConfig.from_folder(bundled_folder()), 0)
            given["lora_modules"] = (f"one={folder}/adapter",)
        engine = AsyncLLM(EngineConfig.from_options({"disable_log_stats": True, "step_timeout": 2.0, **given}))
        await engine.start()
        try:
            await engine.wait_ready()
            await engine.register_prefix(PREFIX)
            if prompts is None:
                adapter = engine.adapters.find("one")
            clients = Clients(engine, prompts or ([*PREFIX, 7], *PROMPTS), adapter)
            expected: dict[tuple[str, int], object] = {}
            for kind in clients.kinds:
                for prompt in range(len(clients.prompts)):
                    expected[kind, prompt] = essence((await ask(clients, kind, prompt))[0])
            until = time.monotonic() + seconds
            await asyncio.gather(
                break_down(engine, tally, every, until),
                *(stream(clients, expected, tally, until) for _ in range(streams)),
            )
            while engine.stats.num_running:
                await asyncio.sleep(0.05)
            await kill_and_shut_down(clients, expected, tally)
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
