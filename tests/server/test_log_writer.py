"""Lines of the log that a disk, a pipe or a reader does not take: no caller waits, and what is lost is counted."""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from quire.server import log_writer
from quire.server.log_writer import LogWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end; the thread of a writer may still hold one."""
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        with suppress(OSError):
            os.close(end)


def log(handler: LogWriter, text: str) -> None:
    handler.handle(logging.LogRecord("x", logging.WARNING, "x.py", 1, text, (), None))


def test_lines_come_whole_and_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = LogWriter(writer)

    def talk(name: str) -> None:
        for number in range(200):
            log(handler, f"{name} {number} é\ud800")

    threads = [threading.Thread(target=talk, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handler.flush()
    os.close(writer)
    with open(reader, "rb", closefd=False) as file:
        lines = file.read().decode().splitlines()
    for name in "ab":
        assert [line for line in lines if line[0] == name] == [f"{name} {n} é\\ud800" for n in range(200)]


def test_a_reader_that_has_stopped_delays_nobody(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads until all is logged: a handler that waits for the pipe would wait for ever."""
    monkeypatch.setattr(log_writer, "FLUSH_SECONDS", 0.05)
    reader, writer = pipe
    handler = LogWriter(writer, max_bytes=200_000)
    for number in range(2000):  # a pipe takes 64 KiB
        log(handler, f"{number} {'x' * 500}")
    handler.flush()  # as at the end of the process
    found: list[str] = []
    with open(reader, closefd=False) as file:
        reading = threading.Thread(target=lambda: found.extend(file.read().splitlines()))
        reading.start()
        monkeypatch.setattr(log_writer, "FLUSH_SECONDS", 10.0)
        handler.flush()
        log(handler, "last")
        handler.flush()
        os.close(writer)
        reading.join()
    num_lost = sum(int(line.split()[0]) for line in found if "were lost" in line)
    num_lines = sum(line.endswith("xxx") for line in found)
    assert num_lines >= 300, "the limit is in bytes"
    assert num_lines + num_lost == 2000
    assert num_lost > 0
    assert found[-1] == "last"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF])
def test_what_the_system_does_not_take_is_counted(
    number: int, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    write: Callable[[int, bytes], int] = os.write
    faults = [number, number]

    def fail(fd: int, data: bytes) -> int:
        if fd == writer and faults:
            raise OSError(faults.pop(), "no")
        return write(fd, data)

    monkeypatch.setattr(log_writer.os, "write", fail)
    handler = LogWriter(writer)
    for text in ("one", "two", "three", "four"):
        log(handler, text)
        handler.flush()
    lines = os.read(reader, 1 << 16).decode().splitlines()
    assert lines[0].startswith("2 lines of the log before this one were lost")
    assert lines[1:] == ["three", "four"]


def test_a_line_that_cannot_be_formed_does_not_fail_its_caller(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    handler = LogWriter(pipe[1])
    handler.handle(logging.LogRecord("x", logging.WARNING, "x.py", 1, "%d", ("no number",), None))
    log(handler, "next")
    handler.flush()
    assert os.read(pipe[0], 100) == b"next\n"
