"""Pictures of simulations: one run over time. Needs matplotlib, which comes with the `bench` extra."""

import importlib.util
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
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"picture is {path}; its name must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ConfigError(f"picture is {path}, but there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a picture needs matplotlib: pip install 'quire-llm[bench]'")


def draw_run(figures: dict[str, Any], path: Path) -> None:
    """Draw batch size and filled slots over time, and the KV memory by kind of use, into `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    over_time, waste = figure.subplots(1, 2, width_ratios=(3, 1))
    times = [point["time"] for point in figures["timeline"]]
    over_time.plot(times, [point["batch"] for point in figures["timeline"]], color="#2a6f97")
    over_time.set(xlabel="time (s)", ylabel="sequences in the batch", ylim=(0, None))
    share = over_time.twinx()
    share.plot(times, [point["token_states_pct"] for point in figures["timeline"]], color="#c8553d", linewidth=0.8)
    share.set(ylabel="slots with tokens (% of the pool)", ylim=(0, 100))
    bottom = 0.0
    for name, label, color in _WASTE:
        waste.bar([0], [figures[name]], bottom=bottom, color=color, label=label, width=0.5)
        bottom += figures[name]
    waste.set(xticks=[], xlim=(-0.5, 2.2), ylabel="KV memory (%)")
    waste.legend(frameon=False, fontsize=7, loc="center right")
    figure.suptitle(f"{figures['policy']}: {figures['model']} on {figures['num_devices']} × {figures['device']}")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
