"""Worker: a process that holds one engine, so that engines which stay loaded can take turns.

Standard library only: the process itself, `python -m benchmarks.peers.worker`, runs in the engine's own interpreter.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.engines import EngineRow, environment, interpreter
from benchmarks.peers.peer_engine import PeerEngine
from benchmarks.peers.workloads import WorkRequest

ROOT = Path(__file__).parents[2]
MARK = "worker: "
"""Begins the lines of a worker; an engine may print others."""
_LAST_WORDS = 3000


class WorkerEnded(Exception):
    """An engine that cannot load a model or died, with the end of its output."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What requests took."""

    seconds: float
    cpu_seconds: float
    """Of all threads of the process and of its children."""


class Worker:
    """An engine that answers requests, all at once and greedily, with an empty prefix cache."""

    def __init__(
        self, row: EngineRow, model: Path, peers: Path, log: Path, *, cpus: Collection[int] | None = None
    ) -> None:
        """Load `model`; the engine has a thread for each of `cpus`, by default those of this process. `log` takes its
        output. Raises `WorkerEnded`."""
        cpus = sorted(os.sched_getaffinity(0) if cpus is None else cpus)
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(interpreter(row, peers)), "-m", "benchmarks.peers.worker"],
                cwd=ROOT,
                env=environment(row, peers, cpus),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self._ask({"row": asdict(row), "model": str(model), "cpus": cpus})
        except BaseException:
            self.close()
            raise

    def run(self, requests: Sequence[WorkRequest]) -> Cost:
        before = tree_cpu_seconds(self._process.pid)
        seconds = self._ask([asdict(request) for request in requests])
        return Cost(seconds, tree_cpu_seconds(self._process.pid) - before)

    def _ask(self, message: object) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            printed = []
            for line in self._process.stdout:
                if line.startswith(MARK):
                    return float(line.removeprefix(MARK))
                printed.append(line)
        except BrokenPipeError:
            printed = []
        words = "".join(printed) + self._log.read_text()
        raise WorkerEnded(f"{self._process.args!r} has ended; its last words:\n{words[-_LAST_WORDS:]}")

    def close(self) -> None:
        """End the engine."""
        with self._process:  # closes the pipes and waits
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tree_cpu_seconds(pid: int) -> float:
    """CPU time of a process, of its ended children and, by the same rule, of its running children."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except FileNotFoundError:  # it ends while it is read
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(tree_cpu_seconds(int(child)) for child in children)


def main() -> None:
    """Load the engine of the first line of the input, and answer the requests of each further line."""
    first = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, first["cpus"])
    adapter = importlib.import_module(f"benchmarks.peers.{first['row']['adapter']}")
    engine: PeerEngine = adapter.open_engine(Path(first["model"]), **first["row"]["options"])
    print(f"{MARK}0", flush=True)
    for line in sys.stdin:
        requests = [WorkRequest(**fields) for fields in json.loads(line)]
        engine.reset(requests)
        begin = time.perf_counter()
        engine.generate(requests, n=1, temperature=0.0)
        print(f"{MARK}{time.perf_counter() - begin}", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
