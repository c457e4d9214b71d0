"""The table of `benchmarks.gpu`: measurements in order of worth, within the time there is, each row kept as it comes.

A machine that is taken away leaves what was measured until then. A measurement that fails, or for which no time is
left, is a row that says so, and the next one goes on.
"""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """A row of the table."""

    what: str
    measured: str
    target: str = ""
    limit: str = ""
    """That physics sets."""


class Measurement(NamedTuple):
    """Rows that are measured together."""

    name: str
    seconds: float
    """It takes about so long, with what it compiles: it is not begun where less is left."""
    run: Callable[[], Iterable[Figure]]


class Table:
    """Rows as they come, printed and, where a path is given, kept in a file."""

    def __init__(self, title: str, path: Path | None = None) -> None:
        self._lines = [f"{title}\n", "| figure | measured | target | limit |", "|---|---|---|---|"]
        self._path = path
        print("\n".join(self._lines), flush=True)

    def add(self, figure: Figure) -> None:
        self._lines.append(f"| {figure.what} | {figure.measured} | {figure.target} | {figure.limit} |")
        print(self._lines[-1], flush=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("\n".join(self._lines) + "\n")


def measure_all(
    measurements: Iterable[Measurement],
    table: Table,
    seconds: float,
    *,
    clean_up: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure one after the other for so many seconds; `clean_up` comes after each."""
    end = clock() + seconds
    for name, needed, run in measurements:
        left = end - clock()
        if needed > left:
            table.add(Figure(name, f"not measured: it takes about {needed:.0f} s, {max(0, left):.0f} are left"))
            continue
        try:
            # Closed as soon as its time is up, so that it lets go of its model.
            with closing(_generator(run)) as figures:
                for figure in figures:
                    table.add(figure)
                    if clock() >= end:
                        table.add(Figure(f"what is left of {name}", "not measured: no time is left"))
                        break
        except Exception as error:  # whatever went wrong is told in its row
            table.add(Figure(name, f"failed: {type(error).__name__}: {one_line(error)}"))
        clean_up()


def _generator(run: Callable[[], Iterable[Figure]]) -> Generator[Figure, None, None]:
    yield from run()


def one_line(error: Exception) -> str:
    """What it says, as a cell of a table."""
    return " ".join(str(error).replace("|", "/").split())[:300]
