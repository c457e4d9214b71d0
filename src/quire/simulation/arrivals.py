"""Arrivals: when each request of a trace comes, as a stream; the whole is never in memory."""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from quire.errors import ConfigError
from quire.simulation.settings import SimulationSettings
from quire.simulation.trace import Trace, TraceRow


class Arrival(NamedTuple):
    """A request that comes at `time` seconds. `number` counts arrivals; `counted` ones are part of the result."""

    number: int
    time: float
    row: TraceRow
    counted: bool = True


def arrivals_of(trace: Trace, settings: SimulationSettings) -> Iterator[Arrival]:
    """The requests of a simulation in order of time.

    With `saturate` the stream has no end: uncounted requests follow the last counted one, so that the last ones run
    among as many others as the first.
    """
    rows = trace.rows
    if settings.saturate:
        num_counted = settings.num_requests or len(rows)
        for index in itertools.count():
            yield Arrival(index, 0.0, rows[index % len(rows)], index < num_counted)
    limit = settings.num_requests
    if limit is None and settings.duration is None:
        limit = len(rows)
    for index, time in enumerate(itertools.islice(_times(trace, settings), limit)):
        if settings.duration is not None and time >= settings.duration:
            return
        yield Arrival(index, time, rows[index % len(rows)])


def expected_requests(trace: Trace, settings: SimulationSettings) -> int | None:
    """How many requests a simulation counts; None if arrivals decide it."""
    return settings.num_requests or (len(trace.rows) if settings.duration is None else None)


def _times(trace: Trace, settings: SimulationSettings) -> Iterator[float]:
    kind, rate = settings.arrivals, settings.rate
    if kind == "auto":
        kind = "trace" if trace.has_arrivals else "poisson"
    if kind == "trace":
        if not trace.has_arrivals:
            raise ConfigError(
                f"trace {trace.name} holds no arrivals; set arrivals to poisson, gamma or bursts, and a rate"
            )
        yield from _times_of_trace(trace, rate)
        return
    if rate is None:
        raise ConfigError(f"{kind} arrivals need a rate in requests per second; set rate, or saturate")
    rng = random.Random(f"arrivals {settings.seed}")
    time = 0.0
    if kind == "bursts":
        while True:
            time += rng.expovariate(rate / settings.burst_size)
            yield from itertools.repeat(time, settings.burst_size)
    shape = 1.0 if kind == "poisson" else settings.cv**-2
    while True:
        time += rng.gammavariate(shape, 1 / (rate * shape)) if shape != 1.0 else rng.expovariate(rate)
        yield time


def _times_of_trace(trace: Trace, rate: float | None) -> Iterator[float]:
    """The trace's own times, repeated without end; a mean gap separates two repetitions."""
    times = [row.arrival or 0.0 for row in trace.rows]
    period = times[-1] * len(times) / max(1, len(times) - 1)
    if period == 0.0 and rate is not None:
        raise ConfigError(
            f"all requests of trace {trace.name} arrive at once; set arrivals to poisson, or leave out rate"
        )
    stretch = 1.0 if rate is None else len(times) / (rate * period)
    for lap in itertools.count():
        if lap and period == 0.0:
            raise ConfigError(f"all requests of trace {trace.name} arrive at once, so it cannot be begun again")
        for time in times:
            yield (lap * period + time) * stretch
