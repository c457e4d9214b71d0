"""Chaos: streams of every kind while the engine process is killed, stopped and starved; each answer is checked.

    python -m benchmarks.chaos --minutes 15 --every 20 --streams 40

Every kind of request is answered once without faults. Then many streams repeat the kinds at random, faults come at
random times, and every answer must equal the first. At the end the engine is killed and shut down at one moment, and
what runs must still be answered. Printed are the answers that were lost, that were wrong, and the pauses that the
streams saw. One run has text, adapters and vectors, and one, a third as long, a small model that reads images.
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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lora import write_adapter
from quire import AsyncLLM, EngineConfig, RequestOutput, SamplingParams
from quire.engine.checkpoint import bundled_folder
from quire.errors import QuireError
from quire.lora.registry import Adapter
from quire.model_config import ModelConfig
from quire.structured_outputs import StructuredOutputsParams
from tests.vision_checkpoints import make_vision_checkpoint, random_image

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
EMBEDDING = "embedding"
"""The kind that asks for a vector instead of tokens."""
IMAGE_KINDS = ("greedy", "seeded", "samples", "stop", EMBEDDING)
"""The kinds that prompts with images are tried in."""
SAME_DIRECTION = 0.9999
"""Least cosine of two vectors of one prompt: what else a step computes may change their last bits."""
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
    kinds: tuple[str, ...] = (*KINDS, EMBEDDING)
    adapter: Adapter | None = None
    """For requests of the kind "adapter"."""


async def ask(clients: Clients, kind: str, prompt: int) -> tuple[Any, float]:
    """What must be equal whenever this is asked, and the longest time between two parts of the answer."""
    total: RequestOutput | None = None
    last, gap = time.monotonic(), 0.0
    if kind == EMBEDDING:
        found = await clients.engine.embed(clients.prompts[prompt])
        return np.array(found.outputs.embedding), time.monotonic() - last
    adapter = clients.adapter if kind == "adapter" else None
    async for delta in clients.engine.generate(clients.prompts[prompt], KINDS[kind], adapter=adapter):
        now = time.monotonic()
        last, gap = now, max(gap, now - last)
        if total is None:
            total = delta
        else:
            total.extend(delta)
    assert total is not None
    return [(sample.index, sample.token_ids, sample.text, sample.finish_reason) for sample in total.outputs], gap


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal; vectors, which are of length 1, if they have one direction."""
    return float(one @ other) > SAME_DIRECTION if isinstance(one, np.ndarray) else bool(one == other)


async def stream(clients: Clients, expected: dict[tuple[str, int], Any], tally: Tally, until: float) -> None:
    """Ask one request after the other, and at least one."""
    while True:
        kind, prompt = random.choice(list(expected))
        before = tally.faults
        try:
            answer, gap = await ask(clients, kind, prompt)
        except QuireError as error:
            tally.lost.append(f"{kind}: {error}")
            await asyncio.sleep(1.0)
        else:
            if tally.faults > before:
                tally.gaps.append(gap)
                tally.kinds.add(kind)
            if same(answer, expected[kind, prompt]):
                tally.right += 1
            else:
                tally.wrong.append(f"{kind}, {prompt}: {answer} instead of {expected[kind, prompt]}")
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


async def kill_and_shut_down(clients: Clients, expected: dict[tuple[str, int], Any], tally: Tally) -> None:
    """Kill the engine at the moment of its shutdown, which still waits for what runs."""
    streams = [asyncio.create_task(stream(clients, expected, tally, 0.0)) for _ in range(LAST_STREAMS)]
    while not clients.engine.stats.num_running and not all(each.done() for each in streams):
        await asyncio.sleep(0.01)
    os.kill(clients.engine.engine_pid, signal.SIGKILL)
    await clients.engine.shutdown(drain_seconds=300.0)
    await asyncio.gather(*streams)


async def with_images(engine: AsyncLLM) -> tuple[Any, ...]:
    """Prompts for an engine that reads images: with one, with two, and with none."""
    assert engine.images is not None
    assert engine.tokenizer is not None
    reader, expander = engine.images.reader, engine.images.expander
    prompts = []
    for number in range(3):
        images = [await reader.read(random_png(60 + 20 * number, 45, seed)) for seed in range(number)]
        text = expander.expand_text(f"What is {expander.marker * number} this?", images)
        prompts.append(expander.locate(None, engine.tokenizer.encode(text), images))
    return tuple(prompts)


def random_png(width: int, height: int, seed: int) -> bytes:
    file = BytesIO()
    random_image(width, height, seed).save(file, "PNG")
    return file.getvalue()


@asynccontextmanager
async def opened(images: bool, prompts: tuple[Any, ...] | None, options: dict[str, Any]) -> AsyncIterator[Clients]:
    """An engine and what is asked of it: of the bundled model, or with `prompts` of one in `options`, or with `images`
    of a small one that reads them."""
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"swap_space": "8MiB", "disk_cache": f"{folder}/disk"}
        given["speculative_config"] = {"method": "ngram"}
        given |= {"disable_log_stats": True, "step_timeout": 2.0, **options}
        if images:
            given["model"] = str(make_vision_checkpoint(Path(folder) / "model", "llava"))
        elif prompts is None:
            write_adapter(Path(folder) / "adapter", ModelConfig.from_folder(bundled_folder()), 0)
            given["lora_modules"] = (f"one={folder}/adapter",)
        engine = AsyncLLM(EngineConfig.from_options(given))
        await engine.start()
        try:
            await engine.wait_ready()
            if images:
                yield Clients(engine, await with_images(engine), IMAGE_KINDS)
                return
            await engine.register_prefix(PREFIX)
            if prompts is None:
                yield Clients(engine, ([*PREFIX, 7], *PROMPTS), adapter=engine.adapters.find("one"))
            else:
                yield Clients(engine, prompts, tuple(kind for kind in KINDS if kind != "adapter"))
        finally:
            await engine.shutdown()


async def chaos(
    *,
    seconds: float,
    every: float,
    streams: int,
    prompts: tuple[Any, ...] | None = None,
    images: bool = False,
    **options: Any,
) -> Tally:
    """Run streams under faults for `seconds`. With `prompts` of one's own, a model in `options` and no adapter."""
    tally = Tally()
    async with opened(images, prompts, options) as clients:
        expected: dict[tuple[str, int], Any] = {}
        for kind in clients.kinds:
            for prompt in range(len(clients.prompts)):
                expected[kind, prompt] = (await ask(clients, kind, prompt))[0]
        until = time.monotonic() + seconds
        await asyncio.gather(
            break_down(clients.engine, tally, every, until),
            *(stream(clients, expected, tally, until) for _ in range(streams)),
        )
        while clients.engine.stats.num_running:
            await asyncio.sleep(0.05)
        await kill_and_shut_down(clients, expected, tally)
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
    failed = False
    for name, images, share in (("text", False, 0.75), ("images", True, 0.25)):
        seconds = 60 * given.minutes * share
        tally = asyncio.run(
            chaos(seconds=seconds, every=given.every, streams=given.streams, images=images, threads=given.threads)
        )
        print("\n".join([*tally.wrong[:5], *tally.lost[:5], f"{name}: {tally}"]), flush=True)
        failed |= bool(tally.wrong or tally.lost)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
