"""The disk tier's files: what was written comes back equal or not at all."""

import errno
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.runner.disk_blocks import FINGERPRINT_BYTES, FORMAT, HASH_BYTES, HEADER_BYTES, DiskBlocks, Write, file_bytes

BLOCK_BYTES = 5000
MINE, OTHER = b"f" * FINGERPRINT_BYTES, b"o" * FINGERPRINT_BYTES
Open = Callable[..., DiskBlocks]


def name_of(number: int) -> bytes:
    return random.Random(number).randbytes(HASH_BYTES)


def content_of(number: int) -> bytes:
    return random.Random(-number - 1).randbytes(BLOCK_BYTES)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    opened: list[DiskBlocks] = []

    def open_store(fingerprint: bytes = MINE, block_bytes: int = BLOCK_BYTES, write: Write = os.write) -> DiskBlocks:
        for store in opened:
            store.close()
        store = DiskBlocks.open(tmp_path, fingerprint, block_bytes, write=write)
        assert store is not None
        opened.append(store)
        return store

    yield open_store
    for store in opened:
        store.close()


def save(store: DiskBlocks, *numbers: int) -> tuple[list[bytes], list[bytes]]:
    """Names that were stored, and that were not."""
    for number in numbers:
        buffer = store.new_buffer(BLOCK_BYTES)
        buffer[HEADER_BYTES:] = content_of(number)
        store.save(name_of(number), buffer)
    stored: list[bytes] = []
    failed: list[bytes] = []
    deadline = time.monotonic() + 10
    while len(stored) + len(failed) < len(numbers) and time.monotonic() < deadline:
        result = store.collect()
        stored += result.stored
        failed += result.failed_stores
        time.sleep(0.001)
    return stored, failed


def read(store: DiskBlocks, number: int) -> bytes | str:
    """The content, or why there is none."""
    store.read(name_of(number))
    result = store.collect(wait_seconds=10.0)
    if result.failed_reads:
        assert result.failed_reads[0][0] == name_of(number)
        return result.failed_reads[0][1]
    assert result.read[0][0] == name_of(number)
    assert result.read[0][1] > 0
    buffer = store.take_buffer(name_of(number))
    content = bytes(buffer[HEADER_BYTES:])
    store.release_buffer(buffer)
    return content


def file_of(folder: Path, number: int) -> Path:
    return folder / FORMAT / MINE.hex() / name_of(number).hex()[:2] / name_of(number).hex()


def test_what_was_saved_is_read_by_this_process_and_the_next(open_store: Open) -> None:
    store = open_store()
    assert store.stored == []
    numbers = list(range(20))
    assert save(store, *numbers) == ([name_of(number) for number in numbers], [])
    assert [read(store, number) for number in (0, 7, 19)] == [content_of(number) for number in (0, 7, 19)]
    assert read(store, 20) == "missing"
    store = open_store()
    assert sorted(store.stored) == sorted((name_of(number), file_bytes(BLOCK_BYTES)) for number in numbers)
    assert all(read(store, number) == content_of(number) for number in numbers)


def test_the_order_of_use_outlives_the_process(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    save(store, 0, 1, 2)
    for age, number in enumerate((2, 0, 1)):
        os.utime(file_of(tmp_path, number), (100 + age, 100 + age))
    assert [name for name, _ in open_store().stored] == [name_of(number) for number in (2, 0, 1)]
    store = open_store()
    read(store, 2)
    assert [name for name, _ in open_store().stored] == [name_of(number) for number in (0, 1, 2)]


@pytest.mark.parametrize("place", [0, 9, 30, 60, 70, 80, HEADER_BYTES, HEADER_BYTES + BLOCK_BYTES - 1])
def test_a_flipped_byte_anywhere_is_a_miss_and_a_line_in_the_log(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    store = open_store()
    save(store, 0, 1)
    path = file_of(tmp_path, 0)
    altered = bytearray(path.read_bytes())
    altered[place] ^= 1
    path.write_bytes(altered)
    assert read(store, 0) == "corrupt"
    assert "does not match its checksum; removed" in caplog.text
    assert not path.exists()
    assert read(store, 1) == content_of(1)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES, HEADER_BYTES + BLOCK_BYTES - 1, HEADER_BYTES + BLOCK_BYTES + 1])
def test_a_file_of_another_length_is_a_miss(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    store = open_store()
    save(store, 0)
    os.truncate(file_of(tmp_path, 0), length)
    assert read(store, 0) == "corrupt"
    assert f"has not the {HEADER_BYTES + BLOCK_BYTES} bytes it should" in caplog.text
    save(store, 0)
    os.truncate(file_of(tmp_path, 0), length)
    assert open_store().stored == [], "nor is it listed after a restart"


def test_a_block_under_another_name_is_a_miss(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    save(store, 0, 1)
    file_of(tmp_path, 0).replace(file_of(tmp_path, 1))
    assert read(store, 1) == "corrupt"


def test_another_model_finds_nothing_but_knows_what_takes_room(open_store: Open, tmp_path: Path) -> None:
    save(open_store(), 0)
    other = open_store(OTHER, 100)
    assert other.stored == [(MINE + name_of(0), file_bytes(BLOCK_BYTES))]
    assert read(other, 0) == "missing"
    other.remove(MINE + name_of(0))
    other.close()
    assert not file_of(tmp_path, 0).exists()


def test_a_forgotten_block_is_gone_after_what_was_written_before(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    buffer = store.new_buffer(BLOCK_BYTES)
    store.save(name_of(0), buffer)
    store.remove(name_of(0))
    store.remove(name_of(1))
    store.close()
    assert not file_of(tmp_path, 0).exists()


def test_a_full_disk_stops_writing_and_leaves_no_half_file(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    room = 3 * (HEADER_BYTES + BLOCK_BYTES) + 700

    def write(file: int, rest: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(file, rest[: min(room, 1000)])
        room -= written
        return written

    store = open_store(write=write)
    stored, failed = save(store, *range(6))
    assert (stored, failed) == ([name_of(n) for n in (0, 1, 2)], [name_of(n) for n in (3, 4, 5)])
    assert store.collect().stopped
    assert caplog.text.count("No space left on device") == 1
    assert all(read(store, number) == content_of(number) for number in (0, 1, 2))
    files = [path for path in (tmp_path / FORMAT / MINE.hex()).rglob("*") if path.is_file()]
    assert len(files) == 3


@pytest.mark.parametrize("gone", [".", FORMAT, f"{FORMAT}/{MINE.hex()}"])
def test_a_folder_removed_while_it_is_used(gone: str, open_store: Open, tmp_path: Path) -> None:
    """Blocks are misses, and those that come are stored or not; no call fails."""
    store = open_store()
    save(store, 0, 1)
    shutil.rmtree(tmp_path / gone)
    assert read(store, 0) == "missing"
    stored, failed = save(store, 2, 3)
    assert sorted(stored + failed) == sorted([name_of(2), name_of(3)])
    store.remove(name_of(1))
    if stored:
        assert read(store, 2) == content_of(2)


def test_a_disk_without_room_for_a_folder_is_no_reason_not_to_start(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store()

    def mkdir(path: Path, mode: int = 0, parents: bool = False, exist_ok: bool = False) -> None:
        if not path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert DiskBlocks.open(tmp_path, b"another model's.", BLOCK_BYTES) is None
    assert "No space left on device; running without it" in caplog.text


def test_what_a_crash_left_unfinished_is_removed(open_store: Open, tmp_path: Path) -> None:
    save(open_store(), 0)
    unfinished = file_of(tmp_path, 0).with_suffix(".part")
    unfinished.write_bytes(b"half")
    stranger = tmp_path / FORMAT / "notes.txt"
    stranger.write_text("not ours")
    assert len(open_store().stored) == 1
    assert not unfinished.exists()
    assert stranger.exists()


def test_an_older_quire_has_the_folder_for_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FORMAT).mkdir()
    with (tmp_path / FORMAT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert DiskBlocks.open(tmp_path, MINE, BLOCK_BYTES) is None
    assert "a process of an older Quire uses" in caplog.text
    again = DiskBlocks.open(tmp_path, MINE, BLOCK_BYTES)
    assert again is not None
    again.close()
    again.close()


def test_other_users_cannot_read(open_store: Open, tmp_path: Path) -> None:
    (tmp_path / FORMAT).mkdir(mode=0o755)
    save(open_store(), 0)
    for path in [tmp_path / FORMAT, *(tmp_path / FORMAT).rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"disk_cache is .* which cannot be used: .* give a folder to write in"):
        DiskBlocks.open(tmp_path / "file", MINE, BLOCK_BYTES)
