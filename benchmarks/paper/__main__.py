"""Run every experiment, and write docs/paper.md and the pictures in docs/paper."""

import argparse
import os
import time
from pathlib import Path

from benchmarks.paper.experiments import run_all
from benchmarks.paper.page import write_page
from benchmarks.paper.pictures import draw_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of paper.md and paper/")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args()
    started = time.perf_counter()
    results = run_all(
        options.workers, lambda line: print(f"{time.perf_counter() - started:6.0f} s  {line}", flush=True)
    )
    (options.docs / "paper").mkdir(parents=True, exist_ok=True)
    draw_all(results, options.docs / "paper")
    (options.docs / "paper.md").write_text(write_page(results), encoding="utf-8")
    print(f"{time.perf_counter() - started:6.0f} s  {options.docs / 'paper.md'} written")


if __name__ == "__main__":
    main()
