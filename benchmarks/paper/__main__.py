"""Run every experiment, and write docs/paper.md and the pictures in docs/paper; or print one section.

python -m benchmarks.paper --only fig12
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from benchmarks.paper.experiments import SECTIONS, jobs_for, jobs_of, run_jobs
from benchmarks.paper.page import write_page, write_section


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the status: 0 done, 1 failed, 130 interrupted."""
    options = _parser().parse_args(arguments)
    if options.list:
        for section in SECTIONS:
            print(f"{section:<10}{sum(map(len, jobs_for(section).values())):>4} simulations")
        return 0
    if options.only is None and importlib.util.find_spec("matplotlib") is None:
        print("paper: the pictures need matplotlib: pip install 'quire-llm[bench]'", file=sys.stderr)
        return 1
    try:
        _run(options.only, options.workers, options.docs)
    except KeyboardInterrupt:
        print("paper: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("paper: a simulation's process was killed; if memory ran out, use fewer --workers", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=_folder, default=Path("docs"), help="folder of paper.md and paper/")
    parser.add_argument("--workers", type=_count, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--only", choices=SECTIONS, help="print this section alone, and write no file")
    parser.add_argument("--list", action="store_true", help="print the names of the sections, and end")
    return parser


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is no folder to write in")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def _run(only: str | None, workers: int, docs: Path) -> None:
    started = time.perf_counter()

    def report(count: int, total: int, what: str) -> None:
        seconds = time.perf_counter() - started
        left = seconds / count * (total - count)
        print(f"{seconds:6.0f} s  {count} of {total}, about {left:.0f} s left: {what}", file=sys.stderr, flush=True)

    jobs = jobs_of() if only is None else jobs_for(only)
    print(f"{sum(map(len, jobs.values()))} simulations on {workers} processes", file=sys.stderr, flush=True)
    results = run_jobs(jobs, workers, report)
    if only is not None:
        print(write_section(only, results))
        return
    from benchmarks.paper.pictures import draw_all

    (docs / "paper").mkdir(exist_ok=True)
    draw_all(results, docs / "paper")
    (docs / "paper.md").write_text(write_page(results), encoding="utf-8")
    print(f"{docs / 'paper.md'} written", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
