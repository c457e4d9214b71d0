"""Refusals of a full server: how long a client waits for its 429, and what it costs the server.

    python -m benchmarks.refusals --seconds 10 --turns 3

Requests of 900 tokens keep the rows and the queue full, whatever the machine's load. In turns, clients that measure ask
one request after the other, or nobody does. The difference in CPU time of the process that answers, divided by the
number of refusals, is what one of them costs; the engine's process is not asked. On a busy machine a client also waits
for a CPU, and so does the server: the times are shown with and without these waits.
"""

import argparse
import os
import statistics
import time

from benchmarks.overload import (
    HEAVY,
    QUEUE,
    SEATS,
    Generator,
    Seen,
    Server,
    Use,
    ask,
    describe_refusals,
    probe,
    with_server,
)

TOKENS = 900
FILL_SECONDS = 20.0
"""In which the queue must be full."""


def wait_full(server: Server) -> None:
    """Return when a request is refused."""
    until, seen = time.monotonic() + FILL_SECONDS, Seen()
    while not seen.refusals:
        assert time.monotonic() < until, "the queue does not fill"
        ask(server, HEAVY, seen)


def measure(server: Server, generator: Generator, seconds: float, turns: int, clients: int) -> None:
    costs, delays, all_seen = list[float](), list[float](), Seen()
    loop = f"{server.pid}/task/{server.pid}"
    for _ in range(turns):
        with generator.load(2 * seconds + FILL_SECONDS, clients=SEATS + QUEUE + clients, tokens=TOKENS):
            wait_full(server)
            before = Use.of(loop)
            seen = probe(server, seconds, HEAVY, clients=clients, pause=0.0)
            asked = Use.of(loop).since(before)
            before = Use.of(loop)
            time.sleep(seconds)
            alone = Use.of(loop).since(before)
        costs.append((asked.worked - alone.worked) / max(1, len(seen.refusals)))
        delays.append(asked.waited / max(1e-9, asked.waited + asked.worked))
        all_seen.add(seen)
        print(
            f"{len(seen.refusals)} refusals and {len(seen.first_tokens)} answers; "
            f"{1e3 * costs[-1]:.2f} ms of CPU time for a refusal; the event loop worked for "
            f"{asked.worked / seconds:.0%} of the time, {alone.worked / seconds:.0%} without refusals"
        )
    print(
        f"{describe_refusals(all_seen)}; the server had no CPU for {statistics.median(delays):.0%} of the time in "
        f"which it could have run; one costs {1e3 * statistics.median(costs):.2f} ms of its CPU time; "
        f"{all_seen.others} other answers; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="in which refusals are measured, in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clients", type=int, default=2, help="threads that measure; each may wait for the others")
    given = parser.parse_args()

    def work(server: Server, generator: Generator) -> None:
        measure(server, generator, given.seconds, given.turns, given.clients)

    with_server(work, nice=0)


if __name__ == "__main__":
    main()
