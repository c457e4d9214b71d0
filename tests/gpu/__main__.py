"""`make test-gpu`: the engine and all kernels on the first CUDA device, and one table of what was shown.

    python -m tests.gpu [--minutes 9] [--output FILE] [--rehearse] [pytest's arguments]

What tells most comes first, the table is written as tests end, and when the time is up the rest is skipped: a machine
that is lent for minutes leaves what it showed. What needs a package that is not there is skipped, and the table says
which. `--rehearse` runs the same without a card, small, in Triton's interpreter.
"""

import argparse
import os
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.from_sources import ENGINE_NEEDS, missing, use_sources

PLACES = ["tests/kernels/triton", "tests/gpu"]
ORDER = ["test_attention", "test_small_kernels", "test_sampling", "test_steps", "test_engine"]
"""Files that come first, by name."""
LAST = ["test_configs", "test_variants"]
"""They compile for cards that need not be there."""
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-tests.md"


class Table:
    """Collects outcomes by test function, cases together, and keeps time."""

    def __init__(self, title: str, path: Path, seconds: float) -> None:
        self._title = title
        self._path = path
        self._end = time.monotonic() + seconds
        self.outcomes: dict[str, Counter[str]] = {}
        self.reasons: dict[str, str] = {}
        self.seconds: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def place(item: pytest.Item) -> int:
            name = item.path.stem
            return ORDER.index(name) if name in ORDER else len(ORDER) + (name in LAST)

        items.sort(key=place)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() >= self._end:
            pytest.skip("no time was left")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._count(report.nodeid, report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("[")[0]
        self.seconds[name] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self._count(name, report)

    def _count(self, name: str, report: pytest.CollectReport | pytest.TestReport) -> None:
        self.outcomes.setdefault(name, Counter())[report.outcome] += 1
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.reasons[name] = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.outcome == "failed":
            text = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr)
            self.reasons.setdefault(name, " ".join(text.replace("|", "/").split())[-300:])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("\n".join(self.lines()) + "\n")

    def lines(self) -> list[str]:
        rows = [
            f"| {name} | {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())} "
            f"| {self.seconds[name]:.1f} | {self.reasons.get(name, '')} |"
            for name, outcomes in self.outcomes.items()
        ]
        return [f"{self._title}\n", "| test | cases | seconds | why not |", "|---|---|---|---|", *rows]


def title() -> str:
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    if find_spec("triton") is not None:
        from triton import __version__

        versions += f", Triton {__version__}"
    if not torch.cuda.is_available():
        return f"No card: a rehearsal on a CPU; {versions}"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (capability {major}.{minor}); {versions}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Test one GPU.")
    parser.add_argument("--minutes", type=float, default=9.0, help="after that, what is left is skipped")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table is kept")
    parser.add_argument("--rehearse", action="store_true", help="without a card")
    options, others = parser.parse_known_args(arguments)
    if not torch.cuda.is_available() and not options.rehearse:
        print("no CUDA device: nothing was tested on a GPU")
        return 0
    notes = use_sources()
    if absent := missing(ENGINE_NEEDS):
        notes.append(f"tests/gpu/test_engine.py was left out: {', '.join(absent)} not installed")
    os.environ["QUIRE_TEST_GPU"] = "1"
    table = Table("; ".join([title(), *notes]), options.output, 60 * options.minutes)
    # A warning of a library on somebody's machine is no failure.
    status = pytest.main(["-q", "-W", "default", "-p", "no:cacheprovider", *PLACES, *others], plugins=[table])
    print("\n" + "\n".join(table.lines()))
    print(f"kept in {options.output}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
