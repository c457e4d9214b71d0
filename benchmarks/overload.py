"""Overload and fairness of a real server: waiting times under ten times the load, and beside a heavy key.

    python -m benchmarks.overload --seconds 20 --turns 3

Overload: the server is filled by as many clients as run and wait at once (full load). Then requests come at ten times
the rate at which it answered. Compared are the times to the first token of accepted requests, and how long a refusal
takes. Fairness: a light key asks alone, and then beside a heavy key that sends ten times as many requests. All is
measured in turns, and the median of the turns' ratios is printed with the load of the machine.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

QUEUE = 16
"""Requests that may wait."""
SEATS = 8
"""Requests that run at once."""
OVERLOAD = 10
LIGHT, HEAVY = "light-key", "heavy-key"


@dataclass
class Seen:
    """What clients saw: seconds."""

    first_tokens: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    others: int = 0
    """Answers that are neither accepted nor refused with 429."""


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie; NaN of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


class Server:
    """A server with two keys."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask(self, seen: Seen, key: str = LIGHT) -> None:
        """One streamed request of 32 tokens."""
        prompt = f"{random.random()} What say you? "
        body = json.dumps({"prompt": prompt, "max_tokens": 32, "ignore_eos": True, "stream": True}).encode()
        begin = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                b"authorization: Bearer %b\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                % (key.encode(), len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 429"):
                seen.refusals.append(time.monotonic() - begin)
                seen.retry_after.append(int(head.lower().partition(b"retry-after: ")[2].split()[0]))
            elif head.startswith(b"HTTP/1.1 200"):
                await reader.readuntil(b"data: ")
                seen.first_tokens.append(time.monotonic() - begin)
                await reader.read()
            else:
                seen.others += 1
        finally:
            writer.close()

    async def closed(self, clients: int, seconds: float, key: str = LIGHT) -> Seen:
        """So many clients, each of which asks again when it was answered."""
        seen, until = Seen(), time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until:
                await self.ask(seen, key)

        await asyncio.gather(*(client() for _ in range(clients)))
        return seen

    async def arriving(self, rate: float, seconds: float, key: str = LIGHT) -> Seen:
        """Requests that arrive at random, `rate` in a second, whatever becomes of those before."""
        seen, until = Seen(), time.monotonic() + seconds
        tasks: set[asyncio.Task[None]] = set()
        while time.monotonic() < until:
            task = asyncio.create_task(self.ask(seen, key))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(random.expovariate(rate))
        await asyncio.gather(*tasks)
        return seen


async def overload(server: Server, seconds: float, turns: int) -> None:
    """Full load and ten times the load in turns."""
    ratios, refusals, waits, others = [], list[float](), list[int](), 0
    for _ in range(turns):
        full = await server.closed(SEATS + QUEUE, seconds)
        rate = len(full.first_tokens) / seconds
        over = await server.arriving(OVERLOAD * rate, seconds)
        ratios.append(percentile(over.first_tokens, 0.99) / percentile(full.first_tokens, 0.99))
        refusals += over.refusals
        waits += over.retry_after
        others += full.others + over.others
        print(
            f"{rate:.1f} requests/s at full load, TTFT p99 {percentile(full.first_tokens, 0.99):.2f} s; at ten times "
            f"{len(over.first_tokens)} accepted, p99 {percentile(over.first_tokens, 0.99):.2f} s, "
            f"{len(over.refusals)} refused"
        )
    print(
        f"overload: TTFT p99 of accepted {statistics.median(ratios):.2f} times that at full load; refusals p50 "
        f"{1e3 * percentile(refusals, 0.5):.1f} ms, p99 {1e3 * percentile(refusals, 0.99):.1f} ms; Retry-After "
        f"{min(waits, default=0)} to {max(waits, default=0)} s; {others} other answers"
    )


async def fairness(server: Server, seconds: float, turns: int) -> None:
    """A light key alone and beside a heavy one in turns."""
    ratios: dict[float, list[float]] = {0.5: [], 0.99: []}
    full = await server.closed(SEATS, seconds)
    rate = max(0.5, len(full.first_tokens) / seconds / OVERLOAD)
    for _ in range(turns):
        alone = await server.arriving(rate, seconds)
        heavy = asyncio.create_task(server.arriving(OVERLOAD * rate, seconds, HEAVY))
        beside = await server.arriving(rate, seconds)
        await heavy
        for share, found in ratios.items():
            found.append(percentile(beside.first_tokens, share) / percentile(alone.first_tokens, share))
        print(
            f"light key: {len(alone.first_tokens)} answers alone, TTFT p99 {percentile(alone.first_tokens, 0.99):.2f} "
            f"s; {len(beside.first_tokens)} beside a heavy key, p99 {percentile(beside.first_tokens, 0.99):.2f} s"
        )
    p50, p99 = (statistics.median(found) for found in ratios.values())
    print(f"fairness: TTFT of the light key beside the heavy one p50 {p50:.2f} times, p99 {p99:.2f} times that alone")


async def with_server(work: Callable[[Server], Awaitable[None]]) -> None:
    """Run `work` with a server of the bundled model."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text("".join(f'[[keys]]\nname = "{key}"\nkey = "{key}"\n' for key in (LIGHT, HEAVY)))
        flags = ["--max-num-seqs", str(SEATS), "--max-queue-size", str(QUEUE), "--api-keys", str(keys), "--no-spare"]
        command = [sys.executable, "-m", "quire", "serve", "--port", "0", "--threads", "1", *flags]
        server = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert server.stderr is not None
        port = 0
        try:
            while b"ready:" not in (line := await server.stderr.readline()):
                assert line, "the server has ended"
                if b"http://" in line:
                    port = int(line.partition(b"http://")[2].split()[0].rpartition(b":")[2])
            os.nice(5)  # the server comes first where both share the cores
            await work(Server(port))
        finally:
            server.terminate()
            await server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()

    async def work(server: Server) -> None:
        await overload(server, given.seconds, given.turns)
        await fairness(server, given.seconds, given.turns)
        print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")

    asyncio.run(with_server(work))


if __name__ == "__main__":
    main()
