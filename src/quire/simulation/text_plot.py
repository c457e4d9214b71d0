"""Plots of simulations in plain text: the KV memory by kind of use, and the batch over time."""

from collections.abc import Sequence
from typing import Any

_KINDS = (
    ("token_states_pct", "█", "token states"),
    ("reservation_pct", "▒", "reserved for tokens to come"),
    ("internal_pct", "░", "inside allocations, never used"),
    ("external_pct", " ", "between allocations, and others"),
)
_BAR_WIDTH = 56
_PLOT_WIDTH, _PLOT_HEIGHT = 64, 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def draw_text(runs: Sequence[dict[str, Any]]) -> str:
    """The figures of several runs as lines of at most 80 columns."""
    return "\n\n".join([_memory(runs), *map(_batch, runs)])


def _memory(runs: Sequence[dict[str, Any]]) -> str:
    """One bar for each run: how its KV memory is used, in percent of it."""
    lines = ["KV memory by use, %"]
    for run in runs:
        bar, done, filled = "", 0.0, 0
        for name, mark, _ in _KINDS:
            done += run[name]
            cells = round(done / 100 * _BAR_WIDTH) - filled
            bar, filled = bar + mark * cells, filled + cells
        lines.append(f"{run['policy']:>15} │{bar:<{_BAR_WIDTH}}│ {run['token_states_pct']:.1f}")
    lines.append(", ".join(f"{mark if mark.strip() else 'blank'} {meaning}" for _, mark, meaning in _KINDS[:2]))
    lines.append(", ".join(f"{mark if mark.strip() else 'blank'} {meaning}" for _, mark, meaning in _KINDS[2:]))
    return "\n".join(lines)


def _batch(run: dict[str, Any]) -> str:
    """Sequences in the batch over time, as columns of blocks."""
    points = run["timeline"]
    title = f"{run['policy']}: requests at once over time"
    if not points:
        return f"{title}: none"
    end = max(run["duration_s"], points[-1]["time"]) or 1.0
    columns: list[list[float]] = [[] for _ in range(_PLOT_WIDTH)]
    for point in points:
        columns[min(_PLOT_WIDTH - 1, int(point["time"] / end * _PLOT_WIDTH))].append(point["batch"])
    means: list[float] = []
    for values in columns:  # an interval without a step repeats the one before it
        means.append(sum(values) / len(values) if values else (means[-1] if means else 0.0))
    top = max(means) or 1.0
    eighths = [round(mean / top * _PLOT_HEIGHT * 8) for mean in means]
    lines = [title]
    for row in reversed(range(_PLOT_HEIGHT)):
        axis = (
            f"{top * (row + 1) / _PLOT_HEIGHT:>8.1f}" if row in (_PLOT_HEIGHT - 1, _PLOT_HEIGHT // 2 - 1) else " " * 8
        )
        lines.append(f"{axis} │" + "".join(_EIGHTHS[min(8, max(0, height - 8 * row))] for height in eighths).rstrip())
    lines.append(" " * 8 + " └" + "─" * _PLOT_WIDTH)
    lines.append(f"{'0':>11}{f'{end:,.0f} s':>{_PLOT_WIDTH - 1}}")
    return "\n".join(lines)
