"""The table of `benchmarks.gpu`: measurements in order of importance within the time available, kept row by row.

If the machine is taken away, the rows measured until then remain. A measurement that fails, or has no time left, is a
row that says so, and the next one runs.
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
    """The physical limit of the figure."""


class Measurement(NamedTuple):
    """A group of rows that are measured together."""

    name: str
    seconds: float
    """Approximate duration with compilation. The measurement is skipped if less time is left."""
    run: Callable[[], Iterable[Figure]]


class Table:
    """Rows as they come, printed and, if a path is given, written to a file."""

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
    """Run the measurements in order within so many seconds; `clean_up` runs after each."""
    end = clock() + seconds
    for name, needed, run in measurements:
        left = end - clock()
        if needed > left:
            table.add(Figure(name, f"not measured: it takes about {needed:.0f} s, {max(0, left):.0f} are left"))
            continue
        try:
            # Close it as soon as its time is up, so that it frees its model.
            with closing(_generator(run)) as figures:
                for figure in figures:
                    table.add(figure)
                    if clock() >= end:
                        table.add(Figure(f"what is left of {name}", "not measured: no time is left"))
                        break
        except Exception as error:  # the row shows the error
            table.add(Figure(name, f"failed: {type(error).__name__}: {one_line(error)}"))
        clean_up()


def _generator(run: Callable[[], Iterable[Figure]]) -> Generator[Figure, None, None]:
    yield from run()


def one_line(error: Exception) -> str:
    """The error as a cell of a table."""
    return " ".join(str(error).replace("|", "/").split())[:300]
