"""MemoryReturn: when memory is handed back, and that a server does it after a peak of large bodies."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from quire.server import memory_return
from quire.server.memory_return import MemoryReturn

MIB = 2**20


def test_memory_is_handed_back_only_after_it_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_return, "LOOK_SECONDS", 0.0)
    sizes: Iterator[int] = iter([100 * MIB, 130 * MIB, 400 * MIB, 200 * MIB, 120 * MIB])
    released = []

    async def requests() -> list[int]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(executor := ThreadPoolExecutor(1))
        memory = MemoryReturn(lambda: next(sizes), lambda: released.append(1))
        counts = []
        for _ in range(4):
            memory.request_began()
            memory.request_ended()
            memory.request_ended()
            await asyncio.sleep(0.02)
            await loop.run_in_executor(executor, int)  # after what was given to the thread before
            counts.append(len(released))
        return counts

    assert asyncio.run(requests()) == [0, 1, 2, 2]
    assert next(sizes, None) is None


PROGRAM = """
import json, time
from concurrent.futures import ThreadPoolExecutor
from quire.server import memory_return
from quire.server.memory_return import resident_bytes
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

memory_return.LOOK_SECONDS = 0.2
bodies = [
    json.dumps({"prompt": "a, " * 2_600_000}).encode(),
    json.dumps({"prompt": ["a " * 130_000] * 30}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "b " * 1000}] * 3900}).encode(),
    json.dumps({"prompt": "x", "user": "c" * 7_900_000}).encode(),
]
paths = ["/v1/completions", "/v1/completions", "/v1/chat/completions", "/v1/completions"]
with RunningServer(ScriptedEngine()) as server:
    server.send("POST", "/v1/completions", {"prompt": "x"})
    idle = resident_bytes()
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda at: server.send("POST", paths[at % 4], bodies[at % 4]), range(COUNT)))
    peak = resident_bytes()
    deadline = time.monotonic() + 60
    while (now := resident_bytes()) > 1.5 * idle and time.monotonic() < deadline:
        time.sleep(0.1)
print(idle >> 20, peak >> 20, now >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and malloc_trim is glibc's")
def test_memory_returns_after_large_bodies() -> None:
    program = PROGRAM.replace("COUNT", "16")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    idle, _, now = map(int, done.stdout.split())
    assert now <= 1.5 * idle  # 1.8 where malloc keeps it
