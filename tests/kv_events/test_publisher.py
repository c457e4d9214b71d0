"""EventPublisher and the router's EventFeed over real sockets."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from quire.errors import ConfigError
from quire.kv_events.messages import AllBlocksCleared, BlockRemoved, BlockStored, decode_events
from quire.kv_events.publisher import EventPublisher
from quire.kv_events_config import KVEventsConfig
from quire.router.event_feed import EventFeed, replay_address
from quire.routing.fleet import Fleet
from quire.routing.policies import LeastWork
from quire.routing.prefix_index import DEVICE, HOST


def free_ports() -> tuple[int, int]:
    """A free port, and one 1,000 above it."""
    with zmq.Context() as context, context.socket(zmq.PUB) as first, context.socket(zmq.PUB) as second:
        for _ in range(50):
            port = first.bind_to_random_port("tcp://127.0.0.1", 20_000, 40_000)
            try:
                second.bind(f"tcp://127.0.0.1:{port + 1000}")
            except zmq.ZMQError:
                first.unbind(f"tcp://127.0.0.1:{port}")
                continue
            return port, port + 1000
    raise AssertionError("no free ports")


def publisher(port: int, replay: int | None = None, **options: Any) -> EventPublisher:
    replies = None if replay is None else f"tcp://*:{replay}"
    return EventPublisher(KVEventsConfig(endpoint=f"tcp://*:{port}", replay_endpoint=replies, **options))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("with_replay", [True, False])
@pytest.mark.parametrize("form", ["map", "array"])
def test_a_late_reader_catches_up_or_knows_nothing_wrong(form: str, with_replay: bool) -> None:
    """Messages before the subscription are replayed; without replay only later ones are known."""
    port, replay = free_ports()
    sender = publisher(port, replay if with_replay else None, format=form, topic="kv@here")
    fleet = Fleet(LeastWork(), max_blocks=100)
    replica = fleet.join("a")

    async def run() -> None:
        sender.publish(1.0, [BlockStored([1, 2], None, [5, 6], 1)])
        sender.publish(2.0, [BlockStored([3], 2, [7], 1), BlockStored([2], None, [], 1, medium="CPU")])
        feed = asyncio.create_task(EventFeed(fleet, "a", f"tcp://127.0.0.1:{port}").run())
        number = 10
        while not fleet.index.num_blocks(replica.number):  # until the subscription has reached the publisher
            sender.publish(3.0, [BlockStored([number], None, [0], 1)])
            number += 1
            await asyncio.sleep(0.02)
        held = fleet.index.prefix_lengths([1, 2, 3])
        assert held == ({replica.number: 3} if with_replay else {})
        if with_replay:
            assert fleet.index.prefix_lengths([2], HOST) == {replica.number: 1}
        sender.publish(4.0, [BlockStored([50], None, [0], 1)])
        await until(lambda: bool(fleet.index.prefix_lengths([50])))
        sender.publish(5.0, [BlockRemoved([50])])
        await until(lambda: not fleet.index.prefix_lengths([50], DEVICE))
        sender.publish(6.0, [AllBlocksCleared()])
        await until(lambda: fleet.index.num_blocks(replica.number) == 0)
        feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)

    try:
        asyncio.run(run())
    finally:
        sender.close()


def test_a_publisher_that_starts_again_is_forgotten() -> None:
    port, _ = free_ports()
    fleet = Fleet(LeastWork(), max_blocks=100)
    fleet.join("a")

    async def run() -> None:
        feed = asyncio.create_task(EventFeed(fleet, "a", f"tcp://127.0.0.1:{port}").run())
        for life in range(2):
            sender = publisher(port)
            number = 100 * life
            while not fleet.index.prefix_lengths([number]):
                sender.publish(1.0, [BlockStored([number], None, [0], 1)])
                await asyncio.sleep(0.02)
            if life:
                assert not fleet.index.prefix_lengths([0])
            else:
                for _ in range(5):
                    sender.publish(1.0, [BlockStored([1], None, [0], 1)])
                await until(lambda: bool(fleet.index.prefix_lengths([1])))
            sender.close()
        feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize(("form", "topic"), [("map", [b"kv@a:1@m"]), ("array", [])])
def test_replay_answers_vllms_way(form: str, topic: list[bytes]) -> None:
    """A question of 8 bytes; the frames of each message, and number −1 at the end. The older form has no topic."""
    port, replay = free_ports()
    sender = publisher(port, replay, buffer_steps=3, format=form, topic="kv@a:1@m")
    for number in range(5):
        sender.publish(1.0, [BlockRemoved([number])])
    with zmq.Context() as context, context.socket(zmq.DEALER) as asker:
        asker.linger = 0
        asker.connect(f"tcp://127.0.0.1:{replay}")
        asker.send_multipart((b"", b"not a question"))
        asker.send_multipart((b"", (0).to_bytes(8, "big")))
        replies = []
        while True:
            assert asker.poll(5000)
            delimiter, *topics, number_bytes, content = asker.recv_multipart()
            assert (delimiter, len(topics)) == (b"", len(topic))
            if int.from_bytes(number_bytes, "big", signed=True) == -1:
                break
            assert topics == topic
            replies.append((int.from_bytes(number_bytes, "big"), decode_events(content)))
    sender.close()
    assert replies == [(number, [BlockRemoved([number])]) for number in (2, 3, 4)]


def test_groups_that_forget_positions_are_not_counted() -> None:
    """vLLM publishes every KV group, under the same hashes: what leaves a window is still in the other layers."""
    fleet = Fleet(LeastWork(), max_blocks=100)
    fleet.join("a")
    feed = EventFeed(fleet, "a", "tcp://127.0.0.1:1")
    whole = BlockStored([1, 2], None, [0, 0], 1, group_idx=1, kv_cache_spec_kind="full_attention")
    window = BlockStored([1, 2, 3], None, [0, 0, 0], 1, group_idx=0, kv_cache_spec_kind="sliding_window")
    for event in (window, whole, BlockRemoved([1, 2], group_idx=0)):
        feed.apply(event)
    assert fleet.index.prefix_lengths([1, 2, 3]) == {0: 2}
    feed.apply(BlockRemoved([2], group_idx=1))
    assert fleet.index.prefix_lengths([1, 2, 3]) == {0: 1}
    feed.apply(BlockStored([9], None, [0], 1, group_idx=3))  # its kind is not said
    assert not fleet.index.prefix_lengths([9])


def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    port, _ = free_ports()
    first = publisher(port)
    with pytest.raises(ConfigError, match=rf"endpoint is 'tcp://\*:{port}', which cannot be used"):
        publisher(port)
    first.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ({"endpiont": "tcp://*:1"}, r"unknown \['endpiont'\]"),
        ({"publisher": "kafka"}, "zmq or null"),
        ({"format": "xml"}, "map or array"),
        ({"hash": "md5"}, "quire or sha256_cbor"),
        ({"endpoint": "5557"}, "tcp://"),
        ({"hwm": 0}, "from 1"),
    ],
)
def test_wrong_configs_are_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVEventsConfig.read(given)


@pytest.mark.parametrize(
    ("address", "replay"), [("tcp://a:5557", "tcp://a:6557"), ("ipc://x", None), ("tcp://[::1]:1", "tcp://[::1]:1001")]
)
def test_replay_addresses(address: str, replay: str | None) -> None:
    assert replay_address(address) == replay
