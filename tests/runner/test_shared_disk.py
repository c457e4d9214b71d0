"""Several engines share the folder of the disk tier: each finds what the others stored, and nothing wrong."""

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quire.runner import disk_blocks
from quire.runner.disk_blocks import FORMAT, HEADER_BYTES, DiskBlocks, Write, file_bytes
from quire.runner.disk_folder import FINGERPRINT_BYTES, HASH_BYTES, LEASE_SECONDS

BLOCK_BYTES = 5000
MINE, OTHER = b"f" * FINGERPRINT_BYTES, b"o" * FINGERPRINT_BYTES
Join = Callable[..., DiskBlocks]


@pytest.fixture
def join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Join]:
    """Open the folder as one more engine, which looks around 50 times a second."""
    monkeypatch.setattr(disk_blocks, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(disk_blocks, "_ALONE_SECONDS", 0.02)
    opened: list[DiskBlocks] = []

    def join(fingerprint: bytes = MINE, write: Write = os.write) -> DiskBlocks:
        store = DiskBlocks.open(tmp_path, fingerprint, BLOCK_BYTES, write=write)
        assert store is not None
        opened.append(store)
        return store

    yield join
    for store in opened:
        store.close()


def name_of(number: int) -> bytes:
    return random.Random(number).randbytes(HASH_BYTES)


def content_of(number: int) -> bytes:
    return random.Random(-number - 1).randbytes(BLOCK_BYTES)


def save(store: DiskBlocks, number: int) -> bool:
    buffer = store.new_buffer(BLOCK_BYTES)
    buffer[HEADER_BYTES:] = content_of(number)
    store.save(name_of(number), buffer)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        result = store.collect()
        if result.stored or result.failed_stores:
            return bool(result.stored)
        time.sleep(0.001)
    raise TimeoutError


def read(store: DiskBlocks, number: int) -> bytes | str:
    """The content, or why there is none."""
    store.read(name_of(number))
    result = store.collect(wait_seconds=10.0)
    if result.failed_reads:
        return result.failed_reads[0][1]
    buffer = store.take_buffer(name_of(number))
    content = bytes(buffer[HEADER_BYTES:])
    store.release_buffer(buffer)
    return content


def learn(store: DiskBlocks, *keys: bytes, seconds: float = 10.0) -> dict[bytes, int]:
    """What the engine learns until it has heard of all keys."""
    heard: dict[bytes, int] = {}
    deadline = time.monotonic() + seconds
    while not heard.keys() >= set(keys) and time.monotonic() < deadline:
        heard.update(store.take_changes())
        time.sleep(0.005)
    return heard


def file_of(folder: Path, number: int) -> Path:
    return folder / FORMAT / MINE.hex() / name_of(number).hex()[:2] / name_of(number).hex()


def leases(folder: Path) -> list[Path]:
    return list((folder / FORMAT / "leases").iterdir())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def test_what_one_stores_the_other_learns_and_reads(join: Join) -> None:
    one, other = join(), join()
    assert save(one, 0)
    assert save(one, 1)
    assert learn(other, name_of(0), name_of(1)) == {name_of(n): file_bytes(BLOCK_BYTES) for n in (0, 1)}
    assert [read(other, n) for n in (0, 1)] == [content_of(n) for n in (0, 1)]
    one.remove(name_of(0))
    assert learn(other, name_of(0)) == {name_of(0): 0}
    assert read(other, 0) == "missing"
    assert read(other, 1) == content_of(1)


def test_engines_of_other_models_and_versions_learn_only_what_takes_room(join: Join) -> None:
    one, other = join(), join(OTHER)
    save(one, 0)
    assert learn(other, MINE + name_of(0)) == {MINE + name_of(0): file_bytes(BLOCK_BYTES)}
    assert read(other, 0) == "missing"
    other.remove(MINE + name_of(0))
    assert learn(one, name_of(0)).get(name_of(0)) in (0, file_bytes(BLOCK_BYTES))
    wait_for(lambda: read(one, 0) == "missing")


def test_an_engine_that_was_alone_learns_of_one_that_came_and_left(join: Join) -> None:
    one = join()
    other = join()
    save(other, 0)
    other.close()
    assert learn(one, name_of(0)) == {name_of(0): file_bytes(BLOCK_BYTES)}


@pytest.mark.parametrize("damage", ["flip", "cut", "other block", "other model"])
def test_damage_that_one_engine_does_is_a_miss_for_the_other(join: Join, tmp_path: Path, damage: str) -> None:
    one, other = join(), join()
    save(one, 0)
    save(one, 1)
    path = file_of(tmp_path, 0)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "other block":
        path.write_bytes(file_of(tmp_path, 1).read_bytes())
    else:
        content[8 : 8 + FINGERPRINT_BYTES] = OTHER
        path.write_bytes(content)
    assert read(other, 0) in ("corrupt", "missing"), "a short file may already be removed by an engine that looked"
    assert read(one, 0) == "missing", "removed by the one that saw it"
    assert save(other, 0)
    assert read(one, 0) == content_of(0)


def test_engines_that_write_the_same_blocks_at_once_and_read_them_meanwhile(join: Join, tmp_path: Path) -> None:
    def dribble(file: int, rest: memoryview) -> int:
        time.sleep(0.0005)
        return os.write(file, rest[:1700])

    stores = [join(write=dribble) for _ in range(3)]
    reader = join()
    seen: list[bytes | str] = []

    def write_all(store: DiskBlocks) -> None:
        for number in range(8):
            assert save(store, number)

    threads = [threading.Thread(target=write_all, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen += [read(reader, number) for number in range(8)]
    for thread in threads:
        thread.join()
    assert set(seen) <= {"missing", *(content_of(number) for number in range(8))}
    assert [read(reader, number) for number in range(8)] == [content_of(number) for number in range(8)]
    assert not list((tmp_path / FORMAT).rglob("*.part"))


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(join: Join, tmp_path: Path) -> None:
    one = join()
    save(one, 0)
    program = (
        "import os, sys, time\n"
        "from quire.runner.disk_blocks import DiskBlocks\n"
        "def write(file, rest):\n"
        "    os.write(file, rest[:100]); print('half', flush=True); time.sleep(60)\n"
        f"store = DiskBlocks.open(sys.argv[1], {MINE!r}, {BLOCK_BYTES}, write=write)\n"
        f"store.save({name_of(1)!r}, store.new_buffer({BLOCK_BYTES})); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        (unfinished,) = (tmp_path / FORMAT).rglob("*.part")
        wait_for(lambda: len(one._lease.others) == 1)
        assert unfinished.exists(), "the file of an engine with a lease is left alone"
        writer.kill()
    assert read(one, 1) == "missing"
    (stale,) = (lease for lease in leases(tmp_path) if lease.name != one._lease.name)
    long_ago = time.time() - LEASE_SECONDS - 60
    os.utime(stale, (long_ago, long_ago))
    wait_for(lambda: not unfinished.exists() and not stale.exists())
    assert read(one, 0) == content_of(0)


def test_an_engine_taken_for_gone_comes_back(join: Join, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def write(file: int, rest: memoryview) -> int:
        if not begun.is_set():
            begun.set()
            go_on.wait(10)
        return os.write(file, rest)

    slow, other = join(write=write), join()
    buffer = slow.new_buffer(BLOCK_BYTES)
    slow.save(name_of(0), buffer)
    assert begun.wait(10)
    next((tmp_path / FORMAT).rglob("*.part")).unlink()  # as the other engine would, if the lease were stale
    go_on.set()
    wait_for(lambda: bool(slow.collect().failed_stores))
    assert save(slow, 1), "one lost block is no reason to stop storing"
    (tmp_path / FORMAT / "leases" / slow._lease.name).unlink()
    wait_for(lambda: (tmp_path / FORMAT / "leases" / slow._lease.name).exists())
    assert learn(other, name_of(1)) == {name_of(1): file_bytes(BLOCK_BYTES)}


def test_a_full_disk_stops_one_engine_and_the_others_read_on(join: Join) -> None:
    def full(file: int, rest: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one, other = join(), join(write=full)
    save(one, 0)
    assert not save(other, 1)
    assert other.collect().stopped
    assert read(other, 0) == content_of(0)
    assert read(one, 1) == "missing"
    assert save(one, 2)
    assert read(other, 2) == content_of(2)
