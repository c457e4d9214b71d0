"""Results: the figures of a comparison so far, as a file that is complete at any time, and as a table.

Standard library only: every engine's own interpreter writes its figures by `write_whole`.
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.workloads import make_workloads

TITLES = {name: workload.title for name, workload in make_workloads().items()} | {
    "W4-sampled": "as many samples instead of beams",
    "W5-first-token": "single stream, no more than that",
    "W7": "process start to first token",
}

Report = dict[str, Any]
"""One run of one engine: version, seconds of each figure, bytes that its start read from disk, peak memory."""


@dataclass
class Results:
    """All figures so far. An interrupted run has the figures measured until then."""

    machine: str
    model: str
    runs: dict[str, list[Report]]
    ceilings: list[dict[str, float]] = field(default_factory=list)
    """One measurement before the first round and one after each round."""
    limits: dict[str, Report] = field(default_factory=dict)
    """Format of the weights → least seconds of the workloads at the best ceilings, as if an engine had reported
    them."""

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self), indent=1))

    def table(self) -> str:
        """Markdown: a row per figure, a column per engine and per limit."""
        columns = self.runs | {name: [limit] for name, limit in self.limits.items()}
        figures = list(dict.fromkeys(name for runs in columns.values() for run in runs for name in run["seconds"]))
        rows = [["", *columns], ["---"] * (len(columns) + 1)]
        rows += [[f"{name} {TITLES[name]}, s", *_cells(columns, partial(_seconds, name))] for name in figures]
        if "W5" in figures:
            rows.append(["W5 decoding, tokens/s", *_cells(columns, _decode_rate)])
        if "W7" in figures:
            rows.append(["W7 read from disk, MiB", *_cells(columns, partial(_mebibytes, "start_disk_bytes"))])
        rows.append(["peak memory, MiB", *_cells(columns, partial(_mebibytes, "peak_memory_bytes"))])
        num_runs = sorted({len(runs) for runs in self.runs.values()})  # two numbers if the comparison was interrupted
        rates = [f"{name} {_with_range([each[name] for each in self.ceilings])}" for name in self.ceilings[0]]
        lines = [
            f"{self.model}, runs of each: {'–'.join(map(str, num_runs))}, median [least, most]",
            f"{self.machine}; ceilings before and after each round, of which limits take the best: {', '.join(rates)}",
            "each model's files were read once before an engine's process started",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
        return "\n".join(lines)


def write_whole(path: Path, text: str) -> None:
    """Replace a file atomically: a reader, also after a crash, finds the old text or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _cells(columns: dict[str, list[Report]], figure: Callable[[Report], float | None]) -> list[str]:
    """One cell per column: the figure over its runs, or a dash without figures."""
    cells = []
    for runs in columns.values():
        values = [value for run in runs if (value := figure(run)) is not None]
        cells.append(_with_range(values) if values else "–")
    return cells


def _seconds(figure: str, run: Report) -> float | None:
    seconds: float | None = run["seconds"].get(figure)
    return seconds


def _decode_rate(run: Report) -> float | None:
    """Tokens per second of a single stream after its first token."""
    whole, first = _seconds("W5", run), _seconds("W5-first-token", run)
    if whole is None or first is None:
        return None
    return (make_workloads()["W5"].num_output_tokens - 1) / (whole - first)


def _mebibytes(figure: str, run: Report) -> float | None:
    count: int | None = run.get(figure)
    return None if count is None else count / 2**20


def _with_range(values: list[float]) -> str:
    digits = 0 if min(values) >= 100 else 2
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} [{least}, {most}]"
