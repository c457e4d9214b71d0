"""A batch under kills: `kill -9` of the engine and of the whole server in turns, until every line is answered.

    python -m benchmarks.batch_kills --lines 10000 --every 20

Checked at the end: every custom_id has exactly one answer, in the output or the error file, and none failed.
"""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import IO, Any

from benchmarks.soak import processes

URL = "/v1/completions"
BOUNDARY = "quire-batch"


@dataclass
class Outcome:
    """What a batch went through, and what its files hold."""

    status: str = ""
    answers: Counter[str] = field(default_factory=Counter)
    """custom_id → its lines in the output and the error file."""
    failed: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def faults(self, num_lines: int) -> list[str]:
        """What is not as promised."""
        expected = {f"r{index}" for index in range(num_lines)}
        found = {
            "missing": expected - self.answers.keys(),
            "unknown": self.answers.keys() - expected,
            "answered more than once": {name for name, count in self.answers.items() if count > 1},
        }
        faults = [f"{len(names)} {kind}: {sorted(names)[:3]}" for kind, names in found.items() if names]
        if self.failed or self.status != "completed":
            faults.append(f"the batch is {self.status}, {self.failed} lines failed")
        return faults


class Server:
    """`quire serve` on a folder of batches; it may be killed and started again."""

    def __init__(self, folder: Path, flags: tuple[str, ...]) -> None:
        self._command = [sys.executable, "-m", "quire", "serve", "--port", "0", "--batch-dir", str(folder), *flags]
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it listens."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"listening on http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError(f"the server has ended with status {self._process.wait()}")
        threading.Thread(target=_discard, args=(self._process.stderr,), daemon=True).start()

    def kill(self, what: str) -> None:
        """Kill -9 "engine", all child processes, or "server", which is then started again."""
        for pid in processes(self._process.pid)[1:] if what == "engine" else [self._process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if what == "server":
            self._process.wait()
            self.start()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def is_ready(self) -> bool:
        """Whether requests are computed now."""
        try:
            self.send("GET", "/health")
        except RuntimeError:
            return False
        return True

    def send(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """The content of a reply with status 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"content-type": kind})
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        if reply.status != 200:
            raise RuntimeError(f"{method} {path}: {reply.status} {content.decode()[:300]}")
        return content

    def upload(self, content: bytes) -> str:
        """The id of a new file."""
        parts = [("purpose", b"batch"), ('file"; filename="input.jsonl', content)]
        form = b"".join(
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
            for name, value in parts
        )
        form += f"--{BOUNDARY}--\r\n".encode()
        reply = json.loads(self.send("POST", "/v1/files", form, f"multipart/form-data; boundary={BOUNDARY}"))
        return str(reply["id"])


def requests(num_lines: int, max_tokens: int) -> bytes:
    """Input of a batch: completions of different prompts."""
    lines = [
        {
            "custom_id": f"r{index}",
            "method": "POST",
            "url": URL,
            "body": {"prompt": f"Scene {index}. ROMEO:", "max_tokens": max_tokens, "ignore_eos": True},
        }
        for index in range(num_lines)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def run(
    num_lines: int,
    *,
    max_tokens: int,
    due: Callable[[float, int], bool],
    flags: tuple[str, ...] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Answer a batch. `due` gets the seconds since the server was ready again and the number of lines answered, and
    says whether it is time for a kill."""
    outcome, kinds = Outcome(), cycle(("engine", "server"))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), flags)
        try:
            started = killed = time.monotonic()
            order = {"input_file_id": server.upload(requests(num_lines, max_tokens)), "endpoint": URL}
            body = json.dumps({**order, "completion_window": "24h"}).encode()
            batch = json.loads(server.send("POST", "/v1/batches", body))
            while batch["status"] in ("validating", "in_progress", "finalizing"):
                time.sleep(0.05)
                batch = json.loads(server.send("GET", f"/v1/batches/{batch['id']}"))
                counts = batch["request_counts"]
                answered = counts["completed"] + counts["failed"]
                if not server.is_ready():
                    killed = time.monotonic()  # a start that is killed ends the server, as it should
                elif batch["status"] == "in_progress" and due(time.monotonic() - killed, answered):
                    what = next(kinds)
                    report(f"{time.monotonic() - started:6.0f} s: {answered} answered, kill -9 of the {what}")
                    server.kill(what)
                    outcome.kills[what] += 1
                    killed = time.monotonic()
            outcome.seconds = time.monotonic() - started
            outcome.status, outcome.failed = batch["status"], batch["request_counts"]["failed"]
            outcome.answers = Counter(_custom_ids(server, batch))
        finally:
            server.stop()
    return outcome


def _custom_ids(server: Server, batch: dict[str, Any]) -> Iterator[str]:
    for name in ("output_file_id", "error_file_id"):
        if batch[name] is not None:
            for line in server.send("GET", f"/v1/files/{batch[name]}/content").splitlines():
                yield json.loads(line)["custom_id"]


def _discard(stream: IO[str]) -> None:
    with stream:
        for _ in stream:
            pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    given = parser.parse_args()
    outcome = run(
        given.lines,
        max_tokens=given.max_tokens,
        due=lambda seconds, _: seconds >= given.every,
        flags=("--threads", "1"),
        report=lambda line: print(line, flush=True),
    )
    kills = ", ".join(f"{count} of the {what}" for what, count in outcome.kills.items())
    print(f"{sum(outcome.answers.values())} answers in {outcome.seconds:.0f} s; kills: {kills}")
    faults = outcome.faults(given.lines)
    print("\n".join(faults) or "every custom_id was answered exactly once")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
