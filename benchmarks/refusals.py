"""Refusals of a full server: how long a client waits for its 429, and what it costs the server.

    python -m benchmarks.refusals --seconds 10 --turns 3

Requests of 900 tokens keep the rows and the queue full, whatever the machine's load. In turns, clients that measure ask
one request after the other, or nobody does. The difference in CPU time of the process that answers, divided by the
number of refusals, is what one of them costs; the engine's process is not asked. On a busy machine a client also waits
for a CPU, and so does the server: both are shown apart, the server's by its share of the time for which it was ready to
run.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.overload import HEAVY, QUEUE, SEATS, Generator, Seen, ask, percentile, probe, with_server

TOKENS = 900
CLIENTS = 2
"""Clients that measure."""
FILL_SECONDS = 20.0
"""In which the queue must be full."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a process used since its start, in seconds."""

    worked: float
    waited: float
    """It was ready to run and got no CPU."""

    @classmethod
    def of(cls, pid: int) -> "Use":
        worked = waited = 0.0
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            on_cpu, ready, _ = path.read_text().split()
            worked, waited = worked + int(on_cpu) / 1e9, waited + int(ready) / 1e9
        return cls(worked, waited)

    def since(self, before: "Use") -> "Use":
        return Use(self.worked - before.worked, self.waited - before.waited)


def wait_full(port: int) -> None:
    """Return when a request is refused."""
    until, seen = time.monotonic() + FILL_SECONDS, Seen()
    while not seen.refusals:
        assert time.monotonic() < until, "the queue does not fill"
        ask(port, HEAVY, seen)


def measure(port: int, pid: int, generator: Generator, seconds: float, turns: int) -> None:
    costs, delays, all_seen = list[float](), list[float](), Seen()
    for _ in range(turns):
        with generator.load(2 * seconds + FILL_SECONDS, clients=SEATS + QUEUE + CLIENTS, tokens=TOKENS):
            wait_full(port)
            before = Use.of(pid)
            seen = probe(port, seconds, HEAVY, clients=CLIENTS, pause=0.0)
            asked = Use.of(pid).since(before)
            before = Use.of(pid)
            time.sleep(seconds)
            alone = Use.of(pid).since(before)
        costs.append((asked.worked - alone.worked) / max(1, len(seen.refusals)))
        delays.append(asked.waited / max(1e-9, asked.waited + asked.worked))
        all_seen.add(seen)
        print(
            f"{len(seen.refusals)} refusals and {len(seen.first_tokens)} answers; "
            f"{1e3 * costs[-1]:.2f} ms of CPU time for a refusal"
        )
    own = sorted(wait - mine for wait, mine in zip(all_seen.refusals, all_seen.own_waits, strict=True))
    times = [1e3 * percentile(values, share) for values in (all_seen.refusals, own) for share in (0.5, 0.99)]
    print(
        f"refusals: {len(own)}, p50 {times[0]:.1f} ms, p99 {times[1]:.1f} ms; without the client's own waits for a CPU "
        f"{times[2]:.1f} and {times[3]:.1f} ms; the server had no CPU for {statistics.median(delays):.0%} of the time "
        f"in which it could have run; one costs {1e3 * statistics.median(costs):.2f} ms of its CPU time; "
        f"{all_seen.others} other answers; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="in which refusals are measured, in each turn")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    pids: list[int] = []
    with_server(
        lambda port, generator: measure(port, pids[0], generator, given.seconds, given.turns),
        started=pids.append,
        nice=0,
    )


if __name__ == "__main__":
    main()
