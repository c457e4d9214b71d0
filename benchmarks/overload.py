"""Overload and fairness of a real server: waiting times under ten times the load, and beside a heavy key.

    python -m benchmarks.overload --seconds 20 --turns 3

Overload: the server is filled by as many clients as run and wait at once (full load). Then requests come at ten times
the rate at which it answered. Compared are the times to the first token of accepted requests, and how long a refusal
takes. Fairness: a light key asks alone, and then beside a heavy key that sends ten times as many requests.

The load comes from a process of the lowest priority unless another is asked for, so that it takes no CPU time from the
server where both share the cores. Its clients count answers and measure nothing. A few clients of this process, which
has the server's priority, measure. They also read how long they, and the process that answers, were ready to run and
got no CPU, and how long the engine worked until their first token: what neighbours on the machine do counts little
there. All is measured in turns.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUEUE = 16
"""Requests that may wait."""
SEATS = 8
"""Requests that run at once."""
PROBES = 4
"""Clients that measure."""
PAUSE = 0.1
"""Mean seconds between an answer and the next request of a client that measures."""
OVERLOAD = 10
LIGHT, HEAVY = "light-key", "heavy-key"


def body_of(key: str, tokens: int = 32) -> bytes:
    """A request of so many tokens, as it is sent."""
    prompt = f"{random.random()} What say you? "
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer %b\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
        % (key.encode(), len(body), body)
    )


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie; NaN of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


# -- the load ---------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Requests of the process that makes the load."""

    port: int
    counts: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "refused": 0, "others": 0})

    async def ask(self, key: str, tokens: int = 32) -> None:
        """One streamed request, read to its end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(body_of(key, tokens))
            answer = await reader.read()
            kinds = {b"200": "accepted", b"429": "refused"}
            self.counts[kinds.get(answer[9:12], "others")] += 1
        finally:
            writer.close()

    async def closed(self, clients: int, seconds: float, key: str, tokens: int = 32) -> None:
        """So many clients, each of which asks again when it was answered."""
        until = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until:
                await self.ask(key, tokens)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def arriving(self, rate: float, seconds: float, key: str) -> None:
        """Requests that arrive at random, `rate` in a second, whatever becomes of those before."""
        begin = due = time.monotonic()
        tasks: set[asyncio.Task[None]] = set()
        while max(due, time.monotonic()) < begin + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))  # what is late is sent at once
            task = asyncio.create_task(self.ask(key))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += random.expovariate(rate)
        await asyncio.gather(*tasks)


def generate(port: int, nice: int) -> None:
    """Make the load that each line of the input describes, and write what became of it."""
    os.nice(nice)
    for line in sys.stdin:
        load, order = Load(port), json.loads(line)
        begin = time.monotonic()
        make = load.closed if "clients" in order else load.arriving
        asyncio.run(make(**order))
        print(json.dumps({**load.counts, "seconds": time.monotonic() - begin}), flush=True)


class Generator:
    """The process that makes the load."""

    def __init__(self, port: int, nice: int) -> None:
        command = [sys.executable, "-m", "benchmarks.overload", "--generate", str(port), "--nice", str(nice)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @contextmanager
    def load(self, seconds: float, key: str = HEAVY, **order: float) -> Iterator[dict[str, Any]]:
        """Have load made while the body runs; what became of it is there behind the body."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"seconds": seconds, "key": key, **order}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = {}
        yield found
        found |= json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What clients that measure saw: seconds."""

    first_tokens: list[float] = field(default_factory=list)
    engine_work: list[float] = field(default_factory=list)
    """CPU time of the engine until each first token."""
    refusals: list[float] = field(default_factory=list)
    own_waits: list[float] = field(default_factory=list)
    """The part of each refusal in which the client was ready to run and got no CPU."""
    server_waits: list[float] = field(default_factory=list)
    """The same of the server's event loop."""
    retry_after: list[int] = field(default_factory=list)
    others: int = 0
    """Answers that are neither accepted nor refused with 429."""

    def add(self, other: "Seen") -> None:
        self.first_tokens += other.first_tokens
        self.engine_work += other.engine_work
        self.refusals += other.refusals
        self.own_waits += other.own_waits
        self.server_waits += other.server_waits
        self.retry_after += other.retry_after
        self.others += other.others


@dataclass(frozen=True, slots=True)
class Use:
    """Seconds in which a thread had a CPU, and in which it was ready to run and had none."""

    worked: float
    waited: float

    @classmethod
    def of(cls, thread: str) -> "Use":
        """Of the thread in this folder of /proc, since its start."""
        on_cpu, ready, _ = Path("/proc", thread, "schedstat").read_text().split()
        return cls(int(on_cpu) / 1e9, int(ready) / 1e9)

    def since(self, before: "Use") -> "Use":
        return Use(self.worked - before.worked, self.waited - before.waited)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is measured."""

    port: int
    pid: int
    engine_pid: int

    def uses(self) -> tuple[Use, Use, Use]:
        """What this thread, the server's event loop and its engine have used."""
        return Use.of("thread-self"), Use.of(f"{self.pid}/task/{self.pid}"), Use.of(f"{self.engine_pid}")


def ask(server: Server, key: str, seen: Seen) -> None:
    """One streamed request: the time to its first token, or to its refusal."""
    request = body_of(key)
    before, begin = server.uses(), time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port)) as connection, connection.makefile("rb") as answer:
        connection.sendall(request)
        status = answer.readline()[9:12]
        if status == b"429":
            seen.refusals.append(time.monotonic() - begin)
            own, api, _ = (use.since(old) for use, old in zip(server.uses(), before, strict=True))
            seen.own_waits.append(own.waited)
            seen.server_waits.append(api.waited)
            (seconds,) = (line for line in answer if line.lower().startswith(b"retry-after"))
            seen.retry_after.append(int(seconds.partition(b":")[2]))
        elif status == b"200":
            while not answer.readline().startswith(b"data: "):
                pass
            seen.first_tokens.append(time.monotonic() - begin)
            seen.engine_work.append(Use.of(f"{server.engine_pid}").since(before[2]).worked)
            answer.read()
        else:
            seen.others += 1


def probe(server: Server, seconds: float, key: str = LIGHT, *, clients: int = PROBES, pause: float = PAUSE) -> Seen:
    """What `clients` see that ask, wait for the answer and pause."""
    seen, until = Seen(), time.monotonic() + seconds

    def client() -> None:
        mine = Seen()
        time.sleep(random.uniform(0.0, pause))
        while time.monotonic() < until:
            ask(server, key, mine)
            time.sleep(pause * random.expovariate(1.0))
        seen.add(mine)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def overload(server: Server, generator: Generator, seconds: float, turns: int) -> float:
    """Full load and ten times the load in turns; returns the requests that the server answers in a second."""
    ratios, of_work, refused, others, rate = list[float](), list[float](), Seen(), 0, 0.0
    for _ in range(turns):
        with generator.load(seconds, clients=SEATS + QUEUE - PROBES) as load:
            full = probe(server, seconds, pause=0.001)
        rate = max(0.1, (load["accepted"] + len(full.first_tokens)) / load["seconds"])
        with generator.load(seconds, rate=OVERLOAD * rate) as more:
            over = probe(server, seconds)
        ratios.append(percentile(over.first_tokens, 0.99) / percentile(full.first_tokens, 0.99))
        of_work.append(percentile(over.engine_work, 0.99) / percentile(full.engine_work, 0.99))
        others += load["others"] + more["others"] + full.others
        refused.add(over)
        sent = sum(more[kind] for kind in ("accepted", "refused", "others")) / seconds
        print(
            f"{rate:.1f} requests/s at full load, TTFT p99 {percentile(full.first_tokens, 0.99):.3f} s; at {sent:.0f} "
            f"requests/s ({sent / rate:.1f} times of {OVERLOAD}) {len(over.first_tokens)} measured, p99 "
            f"{percentile(over.first_tokens, 0.99):.3f} s"
        )
    waits = refused.retry_after
    print(
        f"overload: TTFT p99 of accepted {statistics.median(ratios):.2f} times that at full load, in CPU time of "
        f"the engine {statistics.median(of_work):.2f} times; {describe_refusals(refused)}; Retry-After "
        f"{min(waits, default=0)} to {max(waits, default=0)} s; {others + refused.others} other answers"
    )
    return rate


def describe_refusals(seen: Seen) -> str:
    """How long refusals took, and how long without the times in which client or server waited for a CPU."""
    waits = zip(seen.refusals, seen.own_waits, seen.server_waits, strict=True)
    with_cpu = [max(0.0, wait - own - server) for wait, own, server in waits]
    times = [1e3 * percentile(values, share) for values in (seen.refusals, with_cpu) for share in (0.5, 0.99)]
    return (
        f"{len(with_cpu)} refusals p50 {times[0]:.1f} ms, p99 {times[1]:.1f} ms; without the waits of client and "
        f"server for a CPU {times[2]:.1f} and {times[3]:.1f} ms"
    )


def fairness(server: Server, generator: Generator, seconds: float, turns: int, full_rate: float) -> None:
    """A light key alone and beside a heavy one in turns."""
    ratios: dict[float, list[float]] = {0.5: [], 0.99: []}
    rate = max(0.5, full_rate / OVERLOAD)
    for _ in range(turns):
        alone = probe(server, seconds, clients=2, pause=2 / rate)
        with generator.load(seconds, rate=OVERLOAD * rate) as heavy:
            beside = probe(server, seconds, clients=2, pause=2 / rate)
        for share, found in ratios.items():
            found.append(percentile(beside.first_tokens, share) / percentile(alone.first_tokens, share))
        times = [1e3 * percentile(each.first_tokens, share) for each in (alone, beside) for share in (0.5, 0.99)]
        print(
            f"light key: {len(alone.first_tokens)} answers alone, TTFT p50 {times[0]:.1f} ms, p99 {times[1]:.1f} ms; "
            f"{len(beside.first_tokens)} and {len(beside.refusals)} refusals beside a heavy key with "
            f"{heavy['accepted']}, p50 {times[2]:.1f} ms, p99 {times[3]:.1f} ms"
        )
    p50, p99 = (statistics.median(found) for found in ratios.values())
    print(f"fairness: TTFT of the light key beside the heavy one p50 {p50:.2f} times, p99 {p99:.2f} times that alone")


def engine_of(pid: int) -> int:
    """The engine process of a server."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if "engine_process" in Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    raise RuntimeError(f"process {pid} has no engine")


def with_server(work: Callable[[Server, Generator], None], *, nice: int) -> None:
    """Run `work` with a server of the bundled model, and with load of a process with this niceness."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text("".join(f'[[keys]]\nname = "{key}"\nkey = "{key}"\n' for key in (LIGHT, HEAVY)))
        flags = ["--max-num-seqs", str(SEATS), "--max-queue-size", str(QUEUE), "--api-keys", str(keys), "--no-spare"]
        command = [sys.executable, "-m", "quire", "serve", "--port", "0", "--threads", "1", *flags]
        server = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert server.stderr is not None
        port, generator = 0, None
        try:
            while b"ready:" not in (line := server.stderr.readline()):
                assert line, "the server has ended"
                if b"http://" in line:
                    port = int(line.partition(b"http://")[2].split()[0].rpartition(b":")[2])
            threading.Thread(target=server.stderr.read, daemon=True).start()
            generator = Generator(port, nice)
            work(Server(port, server.pid, engine_of(server.pid)), generator)
        finally:
            if generator is not None:
                generator.close()
            server.terminate()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--load-nice", type=int, default=19, help="niceness of the load; 0 where others would leave it no CPU"
    )
    parser.add_argument("--generate", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--nice", type=int, default=19, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.generate is not None:
        generate(given.generate, given.nice)
        return

    def work(server: Server, generator: Generator) -> None:
        rate = overload(server, generator, given.seconds, given.turns)
        fairness(server, generator, given.seconds, given.turns, rate)
        print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")

    with_server(work, nice=given.load_nice)


if __name__ == "__main__":
    main()
