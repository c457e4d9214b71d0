"""Time to first token of interactive requests, in turns without and with a batch in the background.

    python -m benchmarks.batch_priority --rounds 8 --requests 30

One server, one client that sends a request after the other. In every second phase a batch of long prompts keeps the
engine busy; it is cancelled when the phase ends. With --modelled the scheduler runs on a modelled clock instead, on
which no neighbour of the machine counts.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.batch_kills import URL, Server
from quire.kv_cache.block_pool import BlockPool
from quire.request import BACKGROUND, Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepResult

WORDS = "the king shall come to the hall and speak of the crown that was lost in the war "
BATCH_LINES = 20_000


def prompt(number: int, num_repeats: int) -> str:
    """A prompt that shares no prefix with others."""
    return f"{number:06d} {WORDS * num_repeats}"


def lines(num_repeats: int, max_tokens: int) -> bytes:
    """The input of the batch."""
    requests = (
        {
            "custom_id": f"r{index}",
            "method": "POST",
            "url": URL,
            "body": {"prompt": prompt(10**5 + index, num_repeats), "max_tokens": max_tokens, "ignore_eos": True},
        }
        for index in range(BATCH_LINES)
    )
    return "".join(json.dumps(line) + "\n" for line in requests).encode()


async def first_token_seconds(port: int, text: str) -> float:
    """Send a streamed request; returns the seconds until its first event."""
    body = json.dumps({"prompt": text, "max_tokens": 8, "ignore_eos": True, "stream": True}).encode()
    head = f"POST {URL} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        started = time.perf_counter()
        writer.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"data: ")
        seconds = time.perf_counter() - started
        await reader.read()
        return seconds
    finally:
        writer.close()


def phase(server: Server, num_requests: int, num_repeats: int, first: int) -> list[float]:
    """Times to first token of requests one after the other, with pauses in which the background gets going again."""
    times = []
    for number in range(num_requests):
        times.append(asyncio.run(first_token_seconds(server.port, prompt(first + number, num_repeats))))
        time.sleep(0.1)
    return times


def run_batch(server: Server, file_id: str, num_repeats: int, num_requests: int, first: int) -> tuple[list[float], int]:
    """A phase beside a batch; returns also how many lines were answered in it."""
    order = json.dumps({"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}).encode()
    batch: dict[str, Any] = json.loads(server.send("POST", "/v1/batches", order))
    place = f"/v1/batches/{batch['id']}"
    while batch["request_counts"]["completed"] == 0:
        time.sleep(0.05)
        batch = json.loads(server.send("GET", place))
    times = phase(server, num_requests, num_repeats, first)
    answered = json.loads(server.send("POST", f"{place}/cancel"))["request_counts"]["completed"]
    while json.loads(server.send("GET", place))["status"] != "cancelled":
        time.sleep(0.1)
    return times, answered


@dataclass
class Modelled:
    """The scheduler on a clock: a step takes 20 ms, and for each token of a prompt and of decoding 0.7 and 1 ms."""

    num_background: int
    """Requests of the background in the engine at once."""
    now: float = 0.0
    num_lines: int = 0
    waiting: dict[str, float] = field(default_factory=dict)
    """Interactive requests without a first token, and when they came."""
    times: list[float] = field(default_factory=list)

    def run(self, num_requests: int, num_prompt_tokens: int, rate: float, seed: int = 0) -> list[float]:
        """Times to first token of interactive requests that come as a Poisson process."""
        limits = SchedulerLimits(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=4096)
        scheduler = Scheduler(BlockPool(4096, 16, enable_prefix_caching=True), limits, clock=lambda: self.now)
        dice, arrival, running = random.Random(seed), 0.0, 0
        arrivals = random.Random(seed)  # the same with and without a batch
        num_sent = 0
        while len(self.times) < num_requests:
            while running < self.num_background:
                scheduler.add(self._request(f"b{self.num_lines}", num_prompt_tokens, 32, BACKGROUND, dice))
                self.num_lines, running = self.num_lines + 1, running + 1
            while arrival <= self.now and num_sent < num_requests:
                name = f"c{num_sent}"
                scheduler.add(self._request(name, num_prompt_tokens, 8, 0, dice))
                self.waiting[name], num_sent = arrival, num_sent + 1
                arrival += arrivals.expovariate(rate)
            if not scheduler.has_work:
                self.now = arrival
                continue
            plan = scheduler.schedule()
            num_decoding = sum(count == 1 for count in plan.num_scheduled_tokens)
            self.now += 0.02 + 0.001 * num_decoding + 0.0007 * (plan.num_tokens - num_decoding)
            count = len(plan.sample_rows)
            result = StepResult(token_ids=[7] * count, logprobs=[None] * count, errors=[None] * count)
            for delta in scheduler.update(plan, result):
                if delta.request_id in self.waiting:
                    self.times.append(self.now - self.waiting.pop(delta.request_id))
                running -= delta.request_id[0] == "b" and delta.finish_reason is not None
        return self.times

    @staticmethod
    def _request(name: str, num_tokens: int, max_tokens: int, priority: int, dice: random.Random) -> Request:
        prompt = [dice.randrange(5, 30_000) for _ in range(num_tokens)]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return Request(
            request_id=name, prompt_token_ids=prompt, params=params, max_tokens=max_tokens, priority=priority
        )


def print_modelled(num_requests: int) -> None:
    """Both phases on the modelled clock, for prompts of several lengths."""
    for num_tokens in (400, 100):
        alone = Modelled(0).run(num_requests, num_tokens, rate=0.5)
        engine = Modelled(64)
        beside = engine.run(num_requests, num_tokens, rate=0.5)
        shown = (
            f"p{percent:.0f} {percentile(alone, percent) * 1e3:.0f} / {percentile(beside, percent) * 1e3:.0f} ms "
            f"(×{percentile(beside, percent) / percentile(alone, percent):.2f})"
            for percent in (50.0, 99.0)
        )
        lines_per_second = engine.num_lines / engine.now
        print(f"prompts of {num_tokens} tokens: {', '.join(shown)}; {lines_per_second:.2f} lines/s")


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=30, help="in each phase")
    parser.add_argument("--repeats", type=int, default=8, help="sentences in a prompt, about 20 tokens each")
    parser.add_argument("--modelled", type=int, default=0, help="requests on a modelled clock, instead of a server")
    given = parser.parse_args()
    if given.modelled:
        print_modelled(given.modelled)
        return
    alone, beside, ratios, answered = list[float](), list[float](), list[float](), 0
    with tempfile.TemporaryDirectory() as folder:
        model = [given.model] if given.model else []
        server = Server(Path(folder), (*model, "--threads", "1", "--no-spare"))
        try:
            while not server.is_ready():
                time.sleep(0.1)
            file_id = server.upload(lines(given.repeats, 32))
            phase(server, 5, given.repeats, 0)
            for number in range(given.rounds):
                first = 1000 * (number + 1)
                quiet = phase(server, given.requests, given.repeats, first)
                busy, count = run_batch(server, file_id, given.repeats, given.requests, first + 500)
                alone, beside, answered = alone + quiet, beside + busy, answered + count
                ratios.append(statistics.median(busy) / statistics.median(quiet))
                print(f"round {number + 1}: p50 {statistics.median(quiet) * 1e3:.0f} ms, ×{ratios[-1]:.2f}", flush=True)
        finally:
            server.stop()
    for name, times in (("alone", alone), ("beside a batch", beside)):
        print(f"{name}: p50 {statistics.median(times) * 1e3:.1f} ms, p99 {percentile(times, 99) * 1e3:.1f} ms")
    print(f"median of the rounds' ratios of p50: {statistics.median(ratios):.2f}; {answered} lines answered beside")
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
