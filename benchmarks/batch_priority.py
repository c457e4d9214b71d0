"""Time to first token of interactive requests, in turns without and with a batch in the background.

    python -m benchmarks.batch_priority --rounds 8 --requests 30

One server, one client that sends a request after the other. In every second phase a batch of long prompts keeps the
engine busy; it is cancelled when the phase ends.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.batch_kills import URL, Server

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


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=30, help="in each phase")
    parser.add_argument("--repeats", type=int, default=8, help="sentences in a prompt, about 20 tokens each")
    given = parser.parse_args()
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
