"""A light tenant beside a heavy one in the engine, in CPU time of one thread: what neighbours on the machine do counts
little.

    python -m benchmarks.fairness --rounds 3 --requests 40

In turns: the light tenant alone; beside a heavy one that keeps ten requests in flight; and the same with heavy tenants
treated as all others (`HEAVY_FACTOR` out of reach). A light request comes at a random moment of a step. The time to its
first token begins there.
"""

import argparse
import os
import random
import statistics
import time
from dataclasses import replace
from typing import Any

from quire import LLM, SamplingParams
from quire.request import Request
from quire.scheduler import fair_share

HEAVY_IN_FLIGHT = 10
TURNS = {"alone": 0, "beside": HEAVY_IN_FLIGHT, "beside, not told apart": HEAVY_IN_FLIGHT}


class Tenants:
    """Two tenants of one engine."""

    def __init__(self, llm: LLM, light_tokens: int, heavy_tokens: int, pause: int) -> None:
        """`pause`: most steps between an answer to the light tenant and its next request."""
        self._pause = pause
        self._core = llm._engine._core
        self._sizes = {"light": (light_tokens, 4), "heavy": (heavy_tokens, 24)}
        self._rng = random.Random(0)
        self._num_sent = 0
        self._in_flight: dict[str, set[str]] = {"light": set(), "heavy": set()}

    def send(self, tenant: str) -> str:
        num_tokens, length = self._sizes[tenant]
        self._num_sent += 1
        name = f"{tenant}-{self._num_sent}"
        prompt = [self._rng.randrange(5, 500) for _ in range(num_tokens)]
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        request = Request(request_id=name, prompt_token_ids=prompt, params=params, max_tokens=length)
        self._core.add(replace(request, tenant=tenant))
        self._in_flight[tenant].add(name)
        return name

    def step(self, num_heavy: int) -> tuple[set[str], float]:
        """A step; returns the requests that gained a token, and its CPU time."""
        while len(self._in_flight["heavy"]) < num_heavy:
            self.send("heavy")
        begin = time.thread_time()
        deltas = self._core.step()
        seconds = time.thread_time() - begin
        for delta in deltas.others:
            if delta.finish_reason is not None:
                for names in self._in_flight.values():
                    names.discard(delta.request_id)
        gained = {delta.request_id for delta in deltas.others} | {sample[0] for sample in deltas.samples}
        return gained, seconds

    def first_token(self, num_heavy: int) -> float:
        """CPU seconds to the first token of a light request."""
        seconds = 0.0
        if num_heavy:
            for _ in range(self._rng.randrange(self._pause // 3, self._pause)):
                self.step(num_heavy)
            seconds = self._rng.random() * self.step(num_heavy)[1]  # what is left of the step in which it comes
        name = self.send("light")
        gained: set[str] = set()
        while name not in gained:
            gained, took = self.step(num_heavy)
            seconds += took
        return seconds

    def drain(self) -> None:
        while self._core.has_work:
            self.step(0)


def measure(tenants: Tenants, turn: str, requests: int) -> list[float]:
    factor = fair_share.HEAVY_FACTOR
    fair_share.HEAVY_FACTOR = factor if turn != "beside, not told apart" else 10**9
    try:
        for _ in range(6):
            tenants.first_token(TURNS[turn])  # steps are learned, caches warm
        return [tenants.first_token(TURNS[turn]) for _ in range(requests)]
    finally:
        fair_share.HEAVY_FACTOR = factor
        tenants.drain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="default: the bundled one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40, help="light requests in each turn")
    parser.add_argument("--light", type=int, default=64, help="tokens of a light prompt")
    parser.add_argument("--heavy", type=int, default=400, help="tokens of a heavy prompt")
    parser.add_argument("--pause", type=int, default=30, help="most steps between two light requests")
    given = parser.parse_args()
    options: dict[str, Any] = {"model": given.model} if given.model else {}
    with LLM(num_blocks=2000, max_num_seqs=8, threads=1, scheduling_policy="fair", **options) as llm:
        tenants = Tenants(llm, given.light, given.heavy, given.pause)
        ratios: dict[str, list[tuple[float, float]]] = {turn: [] for turn in TURNS}
        for _ in range(given.rounds):
            found = {turn: sorted(measure(tenants, turn, given.requests)) for turn in TURNS}
            p50, p99 = (statistics.median(found["alone"]), found["alone"][int(0.99 * given.requests)])
            for turn, times in found.items():
                ratios[turn].append((statistics.median(times) / p50, times[int(0.99 * len(times))] / p99))
            figures = [(turn, 1e3 * statistics.median(times), 1e3 * times[-1]) for turn, times in found.items()]
            print("; ".join(f"{turn}: p50 {p50:.1f}, longest {longest:.1f} ms" for turn, p50, longest in figures))
    for turn, pairs in ratios.items():
        p50, p99 = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{turn}: p50 {p50:.2f} times, p99 {p99:.2f} times that alone")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
