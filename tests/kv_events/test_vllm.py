"""KV events between Quire and vLLM's own classes, both ways. QUIRE_TEST_VLLM names a folder with an environment that
has vLLM (its CPU wheel does)."""

import asyncio
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from quire.kv_events.messages import AllBlocksCleared, BlockRemoved, BlockStored, low_bits
from quire.kv_events.publisher import EventPublisher
from quire.kv_events.vllm_hash import hash_block, none_hash
from quire.kv_events_config import KVEventsConfig
from quire.router.event_feed import EventFeed
from quire.routing.fleet import Fleet
from quire.routing.policies import LeastWork
from quire.routing.prefix_index import DEVICE, HOST
from tests.kv_events.test_publisher import free_ports

pytestmark = pytest.mark.skipif(
    not os.environ.get("QUIRE_TEST_VLLM"), reason="names no environment with vLLM: QUIRE_TEST_VLLM"
)
PROGRAM = Path(__file__).with_name("vllm_program.py")
TOPIC = "kv@10.0.0.1:8000@m"


def test_vllm_reads_quire_and_quire_reads_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.router.event_feed.REPLAY_SECONDS", 60.0)  # vLLM's process may be slow here
    first = hash_block(none_hash(), [1, 2, 3, 4])
    names = [low_bits(first), low_bits(hash_block(first, [5, 6, 70000, 8]))]
    (quire_port, quire_replay), (port, replay) = free_ports(), free_ports()
    sender = EventPublisher(
        KVEventsConfig(endpoint=f"tcp://*:{quire_port}", replay_endpoint=f"tcp://*:{quire_replay}", topic=TOPIC)
    )
    python = Path(os.environ["QUIRE_TEST_VLLM"]) / "bin/python"
    command = [str(python), str(PROGRAM), *map(str, (port, replay, quire_port, quire_replay))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as vllm:
        assert vllm.stdin is not None
        try:
            seen = publish_until_read(sender, names, vllm)
            check(seen, names)
            asyncio.run(read_vllm(port, vllm))
        finally:
            sender.close()
            vllm.kill()  # how and when it would end by itself is its own matter


def publish_until_read(sender: EventPublisher, names: list[int], vllm: "subprocess.Popen[str]") -> Any:
    """Publish until vLLM's side has read a message, and return what it says."""
    assert vllm.stdout is not None
    sender.publish(1.0, [BlockStored(list(names), None, [1, 2, 3, 4, 5, 6, 70000, 8], 4)])
    os.set_blocking(vllm.stdout.fileno(), False)
    line, deadline = "", time.monotonic() + 1200
    while not line.endswith("\n"):
        assert vllm.poll() is None and time.monotonic() < deadline  # noqa: PT018
        sender.publish(2.0, [BlockRemoved([names[1]], "GPU"), AllBlocksCleared()])
        time.sleep(0.1)
        line += vllm.stdout.readline() or ""
    return json.loads(line)


def check(seen: Any, names: list[int]) -> None:
    """What vLLM's classes have read."""
    assert [low_bits(bytes.fromhex(text)) for text in seen["hashes"]] == names
    removed = {"type": "BlockRemoved", "block_hashes": [names[1]], "medium": "GPU"}
    topic, (ts, events, *_) = seen["live"]
    assert (topic, ts) == (TOPIC, 2.0)
    assert {**events[0], **removed} == events[0]
    assert events[1]["type"] == "AllBlocksCleared"
    topic, number, (ts, events, *_) = seen["past"][0]
    assert (topic, number, ts) == (TOPIC, 0, 1.0)
    (stored,) = events
    assert stored["block_hashes"] == names
    assert (stored["parent_block_hash"], stored["block_size"], stored["medium"]) == (None, 4, "GPU")
    assert stored["token_ids"] == [1, 2, 3, 4, 5, 6, 70000, 8]
    assert [number for _, number, _ in seen["past"]] == list(range(len(seen["past"])))


async def read_vllm(port: int, vllm: "subprocess.Popen[str]") -> None:
    """Follow vLLM's publisher: the first messages by replay, the others live."""
    assert vllm.stdin is not None
    fleet = Fleet(LeastWork(), max_blocks=100)
    number = fleet.join("a").number
    feed = asyncio.create_task(EventFeed(fleet, "a", f"tcp://127.0.0.1:{port}").run())

    async def until(tier: int, blocks: list[int], length: int) -> None:
        async with asyncio.timeout(120):
            while fleet.index.prefix_lengths(blocks, tier).get(number, 0) != length:
                await asyncio.sleep(0.02)

    await until(DEVICE, [100], 1)
    await until(DEVICE, [1, 2, 3], 2)  # the window's third block is not counted, nor what leaves the window
    await until(HOST, [9], 1)
    vllm.stdin.write("stop\n")
    vllm.stdin.flush()
    await until(DEVICE, [1], 0)
    feed.cancel()
    await asyncio.gather(feed, return_exceptions=True)
