"""LogWriter: a handler of logging whose lines a thread writes, so that no request waits for a disk or a reader.

A terminal that was stopped, a full pipe or a slow disk delays the thread alone. Lines beyond `MAX_BYTES`, and lines
that the system does not take, are lost; the next line that is written says how many.
"""

import logging
import os
import threading
from collections import deque

MAX_BYTES = 4 << 20
"""Most bytes of lines that wait."""
FLUSH_SECONDS = 1.0
"""Longest wait for the thread when the process ends."""


class LogWriter(logging.Handler):
    """Writes to one descriptor."""

    def __init__(self, fd: int, *, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self._fd = fd
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        """Lines that wait, and those that are being written."""
        self._num_bytes = 0
        self._num_lost = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._put(self._encoded(record))
        except Exception:  # as every handler does: logging never fails its caller
            self.handleError(record)

    def _put(self, line: bytes) -> None:
        with self._changed:
            if self._num_bytes + len(line) > self._max_bytes:
                self._num_lost += 1
                return
            self._lines.append(line)
            self._num_bytes += len(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all lines are written, for `FLUSH_SECONDS` at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, FLUSH_SECONDS)

    def close(self) -> None:
        """Let the thread end once it has written what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        super().close()

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    return
                data, num_lines = b"".join(self._lines), len(self._lines)
                num_bytes, num_lost = self._num_bytes, self._num_lost
            is_written = self._write((self._encoded(_loss(num_lost)) if num_lost else b"") + data)
            with self._changed:
                for _ in range(num_lines):
                    self._lines.popleft()
                self._num_bytes -= num_bytes
                self._num_lost += -num_lost if is_written else num_lines
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        """Write all of it; returns whether the system took it."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except OSError:  # no space, or no reader any more
                return False
        return True

    def _encoded(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")


def _loss(number: int) -> logging.LogRecord:
    """The record that says that lines are missing."""
    text = "%d lines of the log before this one were lost: they could not be written, or not fast enough"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (number,), None)
