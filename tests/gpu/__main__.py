"""`make test-gpu`: the engine and all kernels on the first CUDA device, and one table of what was shown.

python -m tests.gpu [pytest's arguments]
"""

import os
import sys
from collections import Counter

import pytest
import torch

PLACES = ["tests/gpu", "tests/kernels/triton"]


class Table:
    """Collects outcomes by test function, cases together."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("[")[0]
        self.seconds[name] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(name, Counter())[report.outcome] += 1

    def lines(self) -> list[str]:
        rows = [
            f"| {name} | {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())} "
            f"| {self.seconds[name]:.1f} |"
            for name, outcomes in self.outcomes.items()
        ]
        return ["| test | cases | seconds |", "|---|---|---|", *rows]


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was tested on a GPU")
        return 0
    os.environ["QUIRE_TEST_GPU"] = "1"
    table = Table()
    status = pytest.main(["-q", "-m", "gpu or not gpu", *PLACES, *arguments], plugins=[table])
    major, minor = torch.cuda.get_device_capability()
    print(f"\n{torch.cuda.get_device_name()} (capability {major}.{minor}), torch {torch.__version__}")
    print("\n".join(table.lines()))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
