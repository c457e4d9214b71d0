"""Servers and routers as processes, each on a free port."""

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence


class Process:
    """`quire ARGUMENTS --port 0`, until the end of the `with`."""

    def __init__(self, *arguments: str, ready: str = "ready: ") -> None:
        self._arguments = arguments
        self._ready = ready
        self.lines: list[str] = []
        self.url = ""

    def start(self, port: int = 0) -> "Process":
        command = [sys.executable, "-m", "quire", *self._arguments, "--port", str(port)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._is_ready = False
        self._settled = threading.Event()  # it is ready, or has ended
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def await_ready(self, seconds: float = 300.0) -> None:
        assert self._settled.wait(seconds), "".join(self.lines)
        assert self._is_ready, "".join(self.lines)

    def kill(self) -> None:
        """Kill it as a machine that fails would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """Ask it to end, and return its status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(20)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (\S+)", line):
                self.url = found[1]
            if self._ready in line:
                self._is_ready = True
                self._settled.set()
        self._settled.set()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        assert self._process.stderr is not None
        self._process.stderr.close()


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start_all(processes: Sequence[Process]) -> None:
    """Start processes at once, and wait for them."""
    for process in processes:
        process.start()
    for process in processes:
        process.await_ready()
