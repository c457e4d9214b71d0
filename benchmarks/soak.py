"""Soak: a server under many requests of all kinds, clients that leave and clients that never read; it must end as it
began.

    python -m benchmarks.soak --requests 100000 --disconnects 10000 --silent 500

Resident memory is read all the time: it may not grow over the second half of the requests, and must come back after a
peak of large requests. Descriptors, threads and KV blocks in use are compared before and after. At the end the server
gets SIGTERM while 200 clients read streams, and every stream must come to its end.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
import urllib.request
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from math import inf
from pathlib import Path
from typing import Any

WARM_REQUESTS = 600
"""Requests before the first reading: caches and the blocks of the pool fill with the first ones."""
FLAGS = ("--num-blocks", "1200", "--responses-store-size", "64KiB")
"""What may fill with time is small, so that it is full before the first reading."""
READINGS = 100
"""Readings of the memory while the requests run."""
LARGE_BODY = 3_500_000
"""Characters of a prompt at the peak."""
MORE_THREADS = min(32, 4 + (os.cpu_count() or 1))
"""Threads that asyncio starts when they are first needed, and keeps."""
WORDS = ("ROMEO:", "First Citizen:", "What say you?", "To be, or not", "O", "the king is dead")


@dataclass(frozen=True, slots=True)
class Reading:
    """The server at one moment."""

    rss: dict[str, int]
    """Bytes by role: api, engine, and the other processes together."""
    descriptors: int
    threads: int
    used_blocks: int
    running: int

    @property
    def total(self) -> int:
        return sum(self.rss.values())


def processes(pid: int) -> list[int]:
    """The process and its children."""
    try:  # each thread has its own
        texts = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [pid, *(each for text in texts for child in text.split() for each in processes(int(child)))]


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of a server's processes by role."""
    rss = {"api": 0, "engine": 0, "others": 0}
    for each in processes(pid):
        try:
            name = Path(f"/proc/{each}/cmdline").read_text()
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{each}/status").read_text())
        except FileNotFoundError:  # it has ended
            continue
        role = "api" if each == pid else "engine" if "engine_process" in name else "others"
        rss[role] += int(found[1]) * 1024 if found else 0
    return rss


def read(pid: int, url: str) -> Reading:
    """Read the server's processes and its metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    time.sleep(0.2)  # until the server has closed this connection too

    def gauge(name: str) -> int:
        found = re.search(rf"^quire:{name}{{.*}} (\S+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else -1

    descriptors = sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in processes(pid))
    threads = sum(len(list(Path(f"/proc/{each}/task").iterdir())) for each in processes(pid))
    return Reading(resident(pid), descriptors, threads, gauge("num_used_kv_blocks"), gauge("num_requests_running"))


# -- requests ---------------------------------------------------------------------------------------------------------


def some_text() -> str:
    return random.choice(WORDS) + " ".join(random.choices(WORDS, k=random.randint(0, 3))) + str(random.random())


def constrained(text: str) -> tuple[str, dict[str, Any], int]:
    """A request with a grammar of its own."""
    regex = f"[a-z]{{1,3}}{random.randint(0, 999)}"
    return "/v1/completions", {"prompt": text, "max_tokens": 6, "structured_outputs": {"regex": regex}}, 200


def any_request() -> tuple[str, dict[str, Any], int]:
    """Path, body and expected status of a request of a random kind."""
    text = some_text()
    short = {"max_tokens": 3, "ignore_eos": True}
    messages = [{"role": "user", "content": text}]
    kinds: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/completions", {"prompt": text, "stream": True, **short}, 200),
        ("/v1/completions", {"prompt": text, "n": 2, "seed": 1, "logprobs": 2, **short}, 200),
        ("/v1/completions", {"prompt": [text, text], "echo": True, "stop": ["zzz"], **short}, 200),
        ("/v1/chat/completions", {"messages": messages, "stream": random.random() < 0.5, **short}, 200),
        ("/v1/completions", {"prompt": text, "temperature": 9.0, "n": 10**6}, 400),
        ("/v1/completions", {"prompt": text, "max_tokens": "x"}, 400),
        ("/tokenize", {"prompt": text}, 200),
        ("/v1/responses", {"input": text, "max_output_tokens": 16}, 200),
        ("/v1/messages", {"messages": messages, "max_tokens": 3, "model": "quire-bundled"}, 200),
        ("/nowhere", {}, 404),
    ]
    return constrained(text) if random.random() < 0.02 else random.choice(kinds)


async def request(port: int, path: str, body: dict[str, Any], leave_after: float | None = None) -> bytes:
    """The whole answer; the client leaves after some seconds if asked."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (path.encode(), len(data), data)
        )
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return b""
        return await reader.read()
    finally:
        writer.close()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def many(
    count: int, at_once: int, port: int, done: Counter[str] | None = None, seconds: float = inf
) -> Counter[str]:
    """Answers to `count` requests, `at_once` at a time: right, or the path with its wrong status. None begins after
    `seconds`."""
    until = time.monotonic() + seconds
    done, left = Counter() if done is None else done, takewhile(lambda _: time.monotonic() < until, range(count))

    async def client() -> None:
        for _ in left:
            path, body, expected = any_request()
            status = status_of(await request(port, path, body))
            done["right" if status == expected else f"{path}: {status} instead of {expected}"] += 1

    await asyncio.gather(*(client() for _ in range(at_once)))
    return done


async def leave(count: int, at_once: int, port: int) -> None:
    """Clients that leave at a random time."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            body = {"prompt": some_text(), "max_tokens": 200, "ignore_eos": True, "stream": True}
            with suppress(TimeoutError):  # a server that gets no CPU has a full backlog: left before it was accepted
                await request(port, "/v1/completions", body, random.uniform(0, 0.2))

    await asyncio.gather(*(client() for _ in range(at_once)))


async def silent(count: int, port: int, seconds: float) -> None:
    """Clients that send a request and never read its answer."""
    body = json.dumps({"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        writers.append(writer)
    await asyncio.sleep(seconds)
    for writer in writers:
        writer.transport.abort()


# -- what must hold ---------------------------------------------------------------------------------------------------


async def watched(count: int, at_once: int, server: Process, port: int, wrong: list[str], seconds: float = inf) -> None:
    """Run requests, for `seconds` at most, and read the memory meanwhile; note wrong answers, and growth over the
    second half."""
    done, readings = Counter[str](), list[dict[str, int]]()
    work = asyncio.create_task(many(count, at_once, port, done, seconds))
    step = max(1, count // READINGS)
    while not work.done():
        await asyncio.wait((work,), timeout=0.2)
        if done.total() >= step * (len(readings) + 1):
            readings.append(resident(server.pid))
            if len(readings) % (READINGS // 10) == 0:
                sizes = ", ".join(f"{role} {rss / 2**20:.1f} MiB" for role, rss in readings[-1].items())
                print(f"{done.total()} requests: {sizes}", flush=True)
    await work
    wrong += [f"{number} answers to {what}" for what, number in done.items() if what != "right"]
    print(f"{done['right']} of {done.total()} answers right")
    if len(readings) < 10:
        return
    tenth = max(1, len(readings) // 10)
    for role in readings[0]:
        middle, end = (
            statistics.median(reading[role] for reading in part)
            for part in (readings[len(readings) // 2 :][:tenth], readings[-tenth:])
        )
        print(f"resident memory of {role}: {middle / 2**20:.1f} MiB at the half, {end / 2**20:.1f} MiB at the end")
        if end > 1.01 * middle:
            wrong.append(f"{role} grew from {middle / 2**20:.1f} MiB to {end / 2**20:.1f} MiB over the second half")


async def peak(count: int, server: Process, port: int, seconds: float = 60.0) -> list[str]:
    """Send large requests at once; the memory of the process that answers must come back within `seconds`."""
    idle = resident(server.pid)["api"]
    body = {"prompt": "ab " * (LARGE_BODY // 3), "max_tokens": 1}
    work = asyncio.gather(*(request(port, "/v1/completions", body) for _ in range(count)))
    highest = idle
    while not work.done():
        await asyncio.sleep(0.05)
        highest = max(highest, resident(server.pid)["api"])
    statuses = Counter(map(status_of, await work))
    begin = time.monotonic()
    while (now := resident(server.pid)["api"]) > 2 * idle and time.monotonic() - begin < seconds:
        await asyncio.sleep(0.5)
    waited = time.monotonic() - begin
    print(
        f"peak of the api: {highest / 2**20:.0f} MiB, {idle / 2**20:.0f} idle, {now / 2**20:.0f} after {waited:.0f} s"
    )
    wrong = [f"{number} large requests answered {status}" for status, number in statuses.items() if status >= 500]
    return wrong + ([f"memory is at {now / idle:.1f} times idle after a peak"] if now > 2 * idle else [])


async def terminated(count: int, server: Process, port: int) -> list[str]:
    """Send SIGTERM while clients read streams: each stream must be whole and the server end well."""
    body = {"prompt": "ROMEO:", "max_tokens": 60, "ignore_eos": True, "stream": True}
    streams = [asyncio.create_task(request(port, "/v1/completions", body)) for _ in range(count)]
    await asyncio.sleep(1.0)
    server.terminate()
    answers = await asyncio.gather(*streams, return_exceptions=True)
    whole = sum(isinstance(each, bytes) and each.rstrip(b"\r\n0").endswith(b"[DONE]") for each in answers)
    refused = sum(isinstance(each, bytes) and each.startswith(b"HTTP/1.1 503") for each in answers)
    code = await server.wait()
    print(f"SIGTERM with {count} streams: {whole} whole, {refused} refused, exit code {code}")
    return [f"{count - whole - refused} streams were cut"] * (whole + refused < count) + [f"exit {code}"] * (code != 0)


async def soak(
    *,
    requests: int,
    disconnects: int,
    num_silent: int,
    seconds: float = inf,
    warm: int = WARM_REQUESTS,
    silent_seconds: float = 5.0,
    num_large: int = 24,
    last_streams: int = 200,
    flags: tuple[str, ...] = FLAGS,
) -> list[str]:
    """Run a server through all of it, after `warm` requests; returns what is not as it was. No more of `requests` begin
    after `seconds`."""
    # A spare starts after the first reading, and would count as growth; so would the first use of many blocks.
    command = [sys.executable, "-m", "quire", "serve", "--port", "0", "--threads", "1", "--no-spare"]
    server = await asyncio.create_subprocess_exec(*command, *flags, stderr=asyncio.subprocess.PIPE)
    assert server.stderr is not None
    wrong: list[str] = []
    try:
        url = ""
        while b"ready:" not in (line := await server.stderr.readline()):
            assert line, "the server has ended"
            if found := re.search(rb"http://\S+", line):
                url = found[0].decode()
        drained = asyncio.create_task(_discard(server.stderr))
        port = int(url.rpartition(":")[2])
        await request(port, *constrained("x")[:2])  # starts the process that checks grammars
        await many(warm, 16, port)
        before = await _settled(server.pid, url)
        with timed(f"{requests} requests"):
            await watched(requests, 16, server, port, wrong, seconds)
        with timed(f"{disconnects} disconnects"):
            await leave(disconnects, 50, port)
        with timed(f"{num_silent} clients that never read"):
            await silent(num_silent, port, silent_seconds)
        try:
            after = await _settled(server.pid, url)
        except TimeoutError:
            return [*wrong, "the server did not answer /metrics within a minute"]
        print(f"before {before}\nafter  {after}")
        wrong += await peak(num_large, server, port)
        wrong += await terminated(last_streams, server, port)
        drained.cancel()
    finally:
        if server.returncode is None:
            server.terminate()
            await server.wait()
    if after.used_blocks or after.running:
        wrong.append(f"{after.used_blocks} blocks and {after.running} requests are left")
    if after.descriptors > before.descriptors:
        wrong.append(f"{after.descriptors} descriptors, {before.descriptors} before")
    if after.threads > before.threads + MORE_THREADS:
        wrong.append(f"{after.threads} threads, {before.threads} before")
    return wrong


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the body took."""
    begin = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - begin:.0f} s", flush=True)


async def _discard(reader: asyncio.StreamReader) -> None:
    while await reader.readline():
        pass


async def _settled(pid: int, url: str) -> Reading:
    """The reading once nothing runs, or after a minute."""
    deadline = time.monotonic() + 60
    while True:
        await asyncio.sleep(0.5)
        reading = await asyncio.to_thread(read, pid, url)
        if not (reading.used_blocks or reading.running) or time.monotonic() > deadline:
            return reading


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--disconnects", type=int, default=10_000)
    parser.add_argument("--silent", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=inf, help="no further requests begin after so many")
    given = parser.parse_args()
    wrong = asyncio.run(
        soak(
            requests=given.requests,
            disconnects=given.disconnects,
            num_silent=given.silent,
            seconds=60 * given.minutes,
        )
    )
    print("\n".join(wrong) or "as it began")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
