"""Blocks that one engine fetches from another: right ones arrive, and nothing else does, whatever the peer is."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.kv_transfer_config import KVTransferConfig
from quire.runner import block_server, peer_blocks
from quire.runner.disk_blocks import HEADER_BYTES, DiskBlocks
from quire.runner.peer_link import MAGIC, PeerError, PeerLink

SIZE = 3000
MODEL, OTHER = b"m" * 16, b"o" * 16
KEY = b"a key of sixteen bytes or more"
HASHES = [bytes([number]) * 32 for number in range(3)]
Open = Callable[..., DiskBlocks]


@pytest.fixture
def open_blocks(tmp_path: Path) -> Iterator[Open]:
    opened: list[DiskBlocks] = []

    def open_blocks(name: str, fingerprint: bytes = MODEL) -> DiskBlocks:
        blocks = DiskBlocks.open(tmp_path / name, fingerprint, SIZE)
        assert blocks is not None
        opened.append(blocks)
        return blocks

    yield open_blocks
    for blocks in opened:
        blocks.close()


def store(blocks: DiskBlocks, block_hash: bytes) -> bytes:
    content = os.urandom(SIZE)
    buffer = blocks.new_buffer(SIZE)
    buffer[HEADER_BYTES:] = content
    blocks.save(block_hash, buffer)
    return content


def read(blocks: DiskBlocks, block_hash: bytes) -> bytes | str:
    """The content of a block, or why there is none."""
    blocks.read(block_hash)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        result = blocks.collect(0.1)
        if result.read:
            return bytes(blocks.take_buffer(block_hash)[HEADER_BYTES:])
        if result.failed_reads:
            return result.failed_reads[0][1]
    raise AssertionError("a read never ended")


def give(blocks: DiskBlocks, key: bytes = KEY) -> str:
    return f"127.0.0.1:{blocks.give(('127.0.0.1', 0), key)}"


def test_blocks_come_from_the_engine_that_has_them(open_blocks: Open, tmp_path: Path) -> None:
    first, second, reader = open_blocks("a"), open_blocks("b"), open_blocks("c")
    reader.fetch_from([give(first), give(second)], KEY)
    one, two = store(first, HASHES[0]), store(second, HASHES[1])
    assert read(reader, HASHES[0]) == one, "also one that is being stored"
    assert read(reader, HASHES[1]) == two
    assert read(reader, HASHES[2]) == "missing"
    assert [path for path in (tmp_path / "c").rglob("*") if path.name == HASHES[0].hex()] == []
    first.close()
    assert read(reader, HASHES[0]) == "missing"
    assert read(reader, HASHES[1]) == two, "a dead peer hides no other"


def test_a_block_that_comes_late_is_waited_for_once(open_blocks: Open) -> None:
    giver, reader = open_blocks("a"), open_blocks("b")
    reader.fetch_from([give(giver)], KEY)
    stored: list[bytes] = []
    timer = threading.Timer(0.1, lambda: stored.append(store(giver, HASHES[0])))
    timer.start()
    assert read(reader, HASHES[0]) == stored[0]
    started = time.monotonic()
    assert [read(reader, block_hash) for block_hash in HASHES[1:] * 3] == ["missing"] * 6
    assert time.monotonic() - started < 2 * peer_blocks.WAIT_MS / 1000


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "other block", "other size"])
def test_a_wrong_block_is_no_block(
    damage: str, open_blocks: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    giver, reader = open_blocks("a"), open_blocks("b")
    reader.fetch_from([give(giver)], KEY)
    for block_hash in HASHES[:2]:
        store(giver, block_hash)
        assert isinstance(read(reader, block_hash), bytes)
    (path,) = (tmp_path / "a").rglob(HASHES[0].hex())
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "cut":
        del content[-1]
    elif damage == "longer":
        content += b"x"
    elif damage == "other block":
        (other,) = (tmp_path / "a").rglob(HASHES[1].hex())
        content = bytearray(other.read_bytes())
    else:
        struct.pack_into("<Q", content, HEADER_BYTES - 40, SIZE - 8)
        del content[-8:]
    path.write_bytes(content)
    assert read(reader, HASHES[0]) == "missing"


@pytest.mark.parametrize(
    ("key", "model", "said"),
    [(b"another key of sixteen bytes", MODEL, "another key"), (KEY, OTHER, "another model, other weights")],
)
def test_others_get_nothing(
    key: bytes, model: bytes, said: str, open_blocks: Open, caplog: pytest.LogCaptureFixture
) -> None:
    giver, reader = open_blocks("a"), open_blocks("b", model)
    reader.fetch_from([give(giver)], key)
    store(giver, HASHES[0])
    assert [read(reader, HASHES[0]) for _ in range(3)] == ["missing"] * 3
    assert sum(said in record.message and "no blocks from" in record.message for record in caplog.records) == 1


def endless(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(1 << 16))


def silent(sock: socket.socket) -> None:
    sock.recv(1 << 16)
    time.sleep(3)


def dripping(sock: socket.socket) -> None:
    sock.sendall(MAGIC + bytes(16))
    for _ in range(100):
        sock.sendall(b"x")
        time.sleep(0.05)


def lying(sock: socket.socket) -> None:
    """It knows the key, and gives another content than its header says."""
    link = PeerLink(sock, KEY, MODEL)
    link.accept()
    block_hash, _ = link.next_question()
    header = struct.pack("<8s16s32sQ32s", b"QUIREKV1", MODEL, block_hash, SIZE, bytes(32))
    link.answer(block_hash, header)
    link.send(bytes(SIZE))


def huge(sock: socket.socket) -> None:
    link = PeerLink(sock, KEY, MODEL)
    link.accept()
    block_hash, _ = link.next_question()
    link.answer(block_hash, struct.pack("<8s16s32sQ32s", b"QUIREKV1", MODEL, block_hash, 2**60, bytes(32)))
    endless(sock)


@pytest.mark.parametrize("behaviour", [endless, silent, dripping, lying, huge])
def test_a_peer_that_misbehaves_costs_a_moment(
    behaviour: Callable[[socket.socket], None], open_blocks: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_blocks, "FETCH_SECONDS", 0.3)
    monkeypatch.setattr(peer_blocks, "WAIT_MS", 0)

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with closing(sock), suppress(OSError, PeerError):
            behaviour(sock)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        reader = open_blocks("a")
        reader.fetch_from([f"127.0.0.1:{listener.getsockname()[1]}"], KEY)
        started = time.monotonic()
        assert [read(reader, HASHES[0]) for _ in range(5)] == ["missing"] * 5
        assert time.monotonic() - started < 5


def test_strangers_hold_no_connection(open_blocks: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_server, "HANDSHAKE_SECONDS", 0.2)
    giver, reader = open_blocks("a"), open_blocks("b")
    address = give(giver)
    host, _, port = address.rpartition(":")
    strangers = [socket.create_connection((host, int(port))) for _ in range(block_server.MAX_CONNECTIONS + 5)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    time.sleep(0.5)
    reader.fetch_from([address], KEY)
    content = store(giver, HASHES[0])
    assert read(reader, HASHES[0]) == content
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_role": "producer"}, "kv_role is 'producer'; it must be kv_producer, kv_consumer or kv_both"),
        ({"kv_connector": "NixlConnector"}, "kv_connector is 'NixlConnector'; Quire's engines speak only with each"),
        ({"kv_port": 70000}, "kv_port is 70000; it must be an integer from 0 to 65535"),
        ({"kv_role": "kv_consumer"}, "a kv_consumer needs the HOST:PORT of at least one producer"),
        ({"kv_peers": "a:1"}, "a kv_producer fetches from nobody"),
        ({"kv_role": "kv_both", "kv_peers": ["a"]}, "each must be HOST:PORT"),
        ({"kv_buffer_size": 1}, "kv_transfer_config has unknown ['kv_buffer_size']"),
        ({"kv_key_file": None}, "kv_key_file is None; give it"),
    ],
)
def test_bad_options(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KVTransferConfig.read({"kv_role": "kv_producer", "kv_key_file": "key", **given})
    assert said in str(caught.value)


def test_bad_keys(tmp_path: Path) -> None:
    config = KVTransferConfig(kv_role="kv_producer", kv_key_file=str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="which cannot be read: No such file"):
        config.read_key()
    (tmp_path / "key").write_text("short\n")
    with pytest.raises(ConfigError, match="has 5 bytes; give at least 16"):
        config.read_key()


def test_a_busy_port(open_blocks: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"kv_port is {port}, where nobody can listen: Address already in use"):
            open_blocks("a").give(("127.0.0.1", port), KEY)
