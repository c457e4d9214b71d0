"""`quire simulate`: replay a trace through the scheduler, or a baseline of the paper, on a modelled device."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.bench_workload import show
from quire.cli.options import flags, split
from quire.errors import ConfigError
from quire.simulation.arrivals import expected_requests
from quire.simulation.cluster_settings import AGENTS, ClusterSettings
from quire.simulation.devices import find_device
from quire.simulation.model_shapes import find_model_shape
from quire.simulation.paged import Progress
from quire.simulation.picture import check_picture, draw_run
from quire.simulation.run_cluster import run_cluster
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.trace import find_trace, read_trace


@flags(SimulationSettings, ClusterSettings, without=frozenset())
def simulate(
    *,
    json: Annotated[Path | None, Parameter(help="Also write the figures to this file, as JSON.")] = None,
    plot: Annotated[Path | None, Parameter(help="Draw the run into this file (needs the bench extra).")] = None,
    **options: Any,
) -> None:
    """Replay a trace through this engine's scheduler or one of the paper's baselines, on a modelled device."""
    simulation_options, cluster_options = split(options, SimulationSettings, ClusterSettings)
    settings, cluster = SimulationSettings(**simulation_options), ClusterSettings(**cluster_options)
    if cluster_options and not cluster.cluster:
        raise ConfigError(f"{min(cluster_options)} is an option of a cluster; give its replicas with --cluster N")
    if json is not None and not json.parent.is_dir():
        raise ConfigError(f"json is {json}, but there is no folder {json.parent}")
    if plot is not None:
        check_picture(plot)
    if plot is not None and cluster.cluster:
        raise ConfigError("plot draws the run of one engine; leave it out, or leave out cluster")
    is_made = settings.trace == AGENTS and bool(cluster.cluster)
    trace = None if is_made else read_trace(find_trace(settings.trace, settings.traces_dir))
    model, device = find_model_shape(settings.model), find_device(settings.device)
    started = time.perf_counter()
    if cluster.cluster or trace is None:
        figures = run_cluster(trace, model, device, settings, cluster)
        show(f"{cluster.routing}: {figures['trace']} on {cluster.cluster} replicas", figures, json)
        _report_speed(figures, time.perf_counter() - started)
        return
    with _progress(settings.policy, expected_requests(trace, settings)) as progress:
        figures = run_simulation(trace, model, device, settings, progress)
    title = f"{settings.policy}: {figures['trace']} on {figures['num_devices']} × {figures['device']}"
    show(title, figures, json)
    _report_speed(figures, time.perf_counter() - started)
    if plot is not None:
        draw_run(figures, plot)


def _report_speed(figures: dict[str, Any], seconds: float) -> None:
    print(
        f"simulated in {seconds:.1f} s: {figures['steps'] / seconds:,.0f} steps/s, "
        f"{figures['generated_tokens'] / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Progress | None]:
    """A progress bar on standard error; None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda ended: bar.update(task, completed=ended)
