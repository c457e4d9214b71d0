"""Pictures of simulations: runs over time. Needs matplotlib, which comes with the `bench` extra."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

_WASTE = (
    ("token_states_pct", "token states", "#2a6f97"),
    ("reservation_pct", "reservation", "#8ab4c9"),
    ("internal_pct", "internal", "#e9c46a"),
    ("external_pct", "external and others", "#c8553d"),
)


def check_picture(path: Path) -> None:
    """Raise `ConfigError` if no picture could be written to `path`. Call it before a long run."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"plot is {path}; its name must end in .png, .svg or .pdf, or be terminal")
    if path.is_dir() or not path.parent.is_dir():
        reason = "which is a folder" if path.is_dir() else f"but there is no folder {path.parent}"
        raise ConfigError(f"plot is {path}, {reason}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"plot is {path}, which cannot be written; give another place")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a picture needs matplotlib: pip install 'quire-llm[bench]'")


def draw_runs(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw batch sizes over time, and the KV memory of each run by kind of use, into `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    over_time, waste = figure.subplots(1, 2, width_ratios=(3, 1 + len(runs) / 2))
    for run in runs:
        times = [point["time"] for point in run["timeline"]]
        over_time.plot(times, [point["batch"] for point in run["timeline"]], label=run["policy"], linewidth=1)
    over_time.set(xlabel="time (s)", ylabel="requests at once", ylim=(0, None))
    over_time.legend(frameon=False, fontsize=7)
    for place, run in enumerate(runs):
        bottom = 0.0
        for name, label, color in _WASTE:
            waste.bar([place], [run[name]], bottom=bottom, color=color, label=None if place else label, width=0.5)
            bottom += run[name]
    waste.set_xticks(range(len(runs)), [run["policy"] for run in runs], rotation=20, fontsize=7)
    waste.set(xlim=(-0.5, len(runs) + 1.2), ylabel="KV memory (%)")
    waste.legend(frameon=False, fontsize=7, loc="center right")
    first = runs[0]
    figure.suptitle(f"{first['trace']}: {first['model']} on {first['num_devices']} × {first['device']}")
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
