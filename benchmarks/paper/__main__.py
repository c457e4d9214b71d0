"""Run every experiment, and write docs/paper.md and the pictures in docs/paper; or print one section.

python -m benchmarks.paper --only fig12
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.paper.experiments import SECTIONS, jobs_for, jobs_of, run_jobs
from benchmarks.paper.page import write_page, write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of paper.md and paper/")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--only", choices=SECTIONS, help="print this section alone, and write no file")
    options = parser.parse_args()
    started = time.perf_counter()

    def report(count: int, total: int, what: str) -> None:
        seconds = time.perf_counter() - started
        left = seconds / count * (total - count)
        print(f"{seconds:6.0f} s  {count} of {total}, about {left:.0f} s left: {what}", file=sys.stderr, flush=True)

    jobs = jobs_of() if options.only is None else jobs_for(options.only)
    print(f"{sum(map(len, jobs.values()))} simulations on {options.workers} processes", file=sys.stderr, flush=True)
    results = run_jobs(jobs, options.workers, report)
    if options.only is not None:
        print(write_section(options.only, results))
        return
    from benchmarks.paper.pictures import draw_all

    (options.docs / "paper").mkdir(parents=True, exist_ok=True)
    draw_all(results, options.docs / "paper")
    (options.docs / "paper.md").write_text(write_page(results), encoding="utf-8")
    print(f"{options.docs / 'paper.md'} written", file=sys.stderr)


if __name__ == "__main__":
    main()
