"""The pictures of docs/paper: SVG of a fixed size; equal figures give equal bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.paper.experiments import NAMES, PANELS, SHARING, THRESHOLD, Knee

COLORS = {
    "paged": "#1d5f8a",
    "orca-oracle": "#4a9d5b",
    "orca-pow2": "#e0a526",
    "orca-max": "#c8553d",
    "fastertransformer": "#7a7a7a",
}
_WASTE = (
    ("token_states_pct", "token states", "#1d5f8a"),
    ("reservation_pct", "reservation", "#8ab4c9"),
    ("internal_pct", "internal", "#e0a526"),
    ("external_pct", "external and others", "#c8553d"),
)


def draw_all(results: dict[str, Any], folder: Path) -> None:
    """Write every picture into `folder`."""
    # Fixed ids and no date: a picture changes only with its figures.
    with matplotlib.rc_context({"svg.hashsalt": "quire", "font.size": 8, "axes.spines.top": False}):
        _save(_waste(results["fig_2"]), folder / "fig02-waste.svg")
        _save(_latency(results["knees"], [panel.label for panel in PANELS]), folder / "fig12-latency.svg")
        _save(_latency(results["knees"], [panel.label for panel in SHARING]), folder / "fig14-sharing.svg")
        _save(_block_sizes(results["fig_18"]), folder / "fig18b-block-size.svg")
        _save(_hits(results["hits"]), folder / "mooncake-tiers.svg")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def _waste(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        bottom = 0.0
        for name, label, color in _WASTE:
            axes.bar([place], [row[name]], bottom=bottom, color=color, label=label if place == 0 else None, width=0.6)
            bottom += row[name]
        axes.text(place, row["token_states_pct"] / 2, f"{row['token_states_pct']:.1f}", ha="center", color="white")
    axes.set(xticks=range(len(rows)), ylabel="KV memory (%)", ylim=(0, 100), xlim=(-0.5, len(rows) + 1))
    axes.set_xticklabels([NAMES[row["policy"]] for row in rows])
    axes.legend(frameon=False, loc="center right")
    return figure


def _latency(knees: Sequence[Knee], labels: Sequence[str]) -> Figure:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, label in zip(figure.subplots(2, 3).flat, labels, strict=True):
        here = [knee for knee in knees if knee.panel.label == label]
        for knee in here:
            rates = [rate for rate, latency in knee.points if latency < 4 * THRESHOLD]
            axes.plot(
                rates,
                [latency for _, latency in knee.points if latency < 4 * THRESHOLD],
                marker=".",
                color=COLORS[knee.policy],
                label=NAMES[knee.policy],
            )
        axes.axhline(THRESHOLD, color="black", linewidth=0.5, linestyle=":")
        panel = here[0].panel
        axes.set(title=f"({label}) {panel.model}, {panel.trace.split('_')[0]}", ylim=(0, 1), xlim=(0, None))
        axes.set(xlabel="requests per second", ylabel="s per token")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def _block_sizes(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(5, 2.4), layout="constrained")
    axes = figure.subplots()
    for trace in dict.fromkeys(row["trace"] for row in rows):
        here = [row for row in rows if row["trace"] == trace]
        axes.plot(
            [row["block_size"] for row in here],
            [row["normalized_latency_mean"] for row in here],
            marker=".",
            label=trace.split("_")[0],
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="block size (tokens)", ylabel="s per token", yscale="log")
    axes.legend(frameon=False)
    return figure


def _hits(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.subplots()
    for tiers in dict.fromkeys(row["tiers"] for row in rows):
        here = [row for row in rows if row["tiers"] == tiers]
        pools = [row["kv_slots"] / 2**20 for row in here]
        axes.plot(pools, [row["prefix_hit_pct"] for row in here], marker=".", label=f"below the pool: {tiers}")
    axes.axhline(rows[0]["unbounded_prefix_hit_tokens_pct"], color="black", linewidth=0.5, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="pool (Mi tokens)", ylabel="hits (% of prompt tokens)", ylim=(0, None))
    axes.legend(frameon=False, fontsize=6)
    return figure
