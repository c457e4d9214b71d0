"""Soak: a server under many requests, clients that leave and clients that never read; it must end as it began.

    python -m benchmarks.soak --requests 100000 --disconnects 10000 --silent 500

Compared before and after: resident memory and open descriptors of the server's processes, and KV blocks in use.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

WARM_REQUESTS = 300
"""Requests before the first reading: pools and caches fill with the first ones."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The server at one moment."""

    rss: int
    """Bytes of its processes."""
    descriptors: int
    used_blocks: int
    running: int


def processes(pid: int) -> list[int]:
    """The process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in processes(int(child)))]


def read(pid: int, url: str) -> Reading:
    """Read the server's processes and its metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    time.sleep(0.2)  # until the server has closed this connection too

    def gauge(name: str) -> int:
        found = re.search(rf"^quire:{name}{{.*}} (\S+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else -1

    rss = descriptors = 0
    for each in processes(pid):
        folder = Path(f"/proc/{each}")
        descriptors += len(list((folder / "fd").iterdir()))
        rss += int(re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())[1]) * 1024  # type: ignore[index]
    return Reading(rss, descriptors, gauge("num_used_kv_blocks"), gauge("num_requests_running"))


async def request(port: int, max_tokens: int, leave_after: float | None = None) -> int:
    """The status of one streamed request; the client leaves after some seconds if asked."""
    prompt = "".join(random.choice("abcdefghij ") for _ in range(random.randint(1, 200)))
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return 0
        return int((await reader.read()).split(b" ", 2)[1])
    finally:
        writer.close()


async def many(count: int, at_once: int, port: int, *, leave: bool) -> dict[int, int]:
    """Statuses of `count` requests, `at_once` at a time."""
    statuses: dict[int, int] = {}
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            status = await request(port, 200 if leave else 4, random.uniform(0, 0.2) if leave else None)
            statuses[status] = statuses.get(status, 0) + 1

    await asyncio.gather(*(client() for _ in range(at_once)))
    return statuses


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


async def soak(
    *,
    requests: int,
    disconnects: int,
    num_silent: int,
    warm: int = WARM_REQUESTS,
    silent_seconds: float = 5.0,
    flags: tuple[str, ...] = (),
) -> list[str]:
    """Run a server through all of it, after `warm` requests; returns what is not as it was."""
    # A spare starts after the first reading, and would count as growth.
    command = [sys.executable, "-m", "quire", "serve", "--port", "0", "--threads", "1", "--no-spare", *flags]
    server = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert server.stderr is not None
    try:
        url = ""
        while b"ready:" not in (line := await server.stderr.readline()):
            assert line, "the server has ended"
            if found := re.search(rb"http://\S+", line):
                url = found[0].decode()
        drained = asyncio.create_task(_discard(server.stderr))
        port = int(url.rpartition(":")[2])
        await many(warm, 16, port, leave=False)
        before = await asyncio.to_thread(read, server.pid, url)
        statuses = await many(requests, 16, port, leave=False)
        await many(disconnects, 50, port, leave=True)
        await silent(num_silent, port, silent_seconds)
        after = await _settled(server.pid, url)
        print(f"before {before}\nafter  {after}\nstatuses {statuses}")
        drained.cancel()
    finally:
        server.terminate()
        await server.wait()
    wrong = [f"{count} answers with status {status}" for status, count in statuses.items() if status != 200]
    if after.used_blocks or after.running:
        wrong.append(f"{after.used_blocks} blocks and {after.running} requests are left")
    if after.descriptors > before.descriptors:
        wrong.append(f"{after.descriptors} descriptors, {before.descriptors} before")
    if after.rss > 1.01 * before.rss + 8 * 2**20:
        wrong.append(f"{after.rss / 2**20:.0f} MiB, {before.rss / 2**20:.0f} MiB before")
    return wrong


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
    given = parser.parse_args()
    wrong = asyncio.run(soak(requests=given.requests, disconnects=given.disconnects, num_silent=given.silent))
    print("\n".join(wrong) or "as it began")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
