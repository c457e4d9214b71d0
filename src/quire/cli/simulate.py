"""`quire simulate`: replay a trace through the scheduler, or baselines of the paper, on a modelled device."""

import json as json_format
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.bench_workload import show
from quire.cli.options import OutputFile, flags, split
from quire.cli.simulate_tables import CLUSTER, ENGINE, Column, print_table
from quire.errors import ConfigError
from quire.simulation.arrivals import expected_requests
from quire.simulation.cluster_settings import AGENTS, MADE_TRACES, ClusterSettings
from quire.simulation.devices import find_device
from quire.simulation.model_shapes import find_model_shape
from quire.simulation.paged import Progress
from quire.simulation.picture import check_picture, draw_runs
from quire.simulation.run_cluster import expected_turns, run_cluster
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.text_plot import draw_text
from quire.simulation.trace import Trace, find_trace, read_trace

TERMINAL = "terminal"
DEFAULT_TRACE = "sharegpt"
DEFAULT_POLICIES = "paged,orca-oracle,orca-max"
NUM_SATURATING = 1000
"""Requests by default where the queue is always full."""
LONG_MODEL, LONG_DEVICE = "Llama-3.1-8B", "H100"
"""The model and the device of traces that the default model's context cannot hold."""
CLUSTER_RATE, NUM_SESSIONS = 0.5, 32
"""Sessions of agents per second, and how many, by default."""


@flags(SimulationSettings, ClusterSettings, without=frozenset())
def simulate(
    *,
    json: Annotated[OutputFile, Parameter(help="Also write all figures to this file, as JSON.")] = None,
    plot: Annotated[
        str | None, Parameter(help="terminal draws the run as text; a .svg, .png or .pdf file needs the bench extra.")
    ] = None,
    all_figures: Annotated[bool, Parameter(help="Print every figure, not only the headlines.", negative=())] = False,
    **options: Any,
) -> None:
    """Replay a trace through this engine's scheduler or the paper's baselines, on a modelled device.

    Without options: lengths of ShareGPT, OPT-13B on an A100, a queue that is always full, as in the paper's figure 2.
    With --cluster N: sessions of agents on N replicas behind the router.
    """
    simulation_options, cluster_options = split(options, SimulationSettings, ClusterSettings)
    if plot is not None and plot != TERMINAL:
        check_picture(Path(plot))
    started = time.perf_counter()
    columns: tuple[Column, ...]
    if cluster_options:
        if not cluster_options.get("cluster"):
            raise ConfigError(f"{min(cluster_options)} is an option of a cluster; give its replicas with --cluster N")
        if plot is not None:
            raise ConfigError("plot draws the run of one engine; leave it out, or leave out cluster")
        runs = _run_clusters(simulation_options, cluster_options)
        name, columns = "routing", CLUSTER
    else:
        runs = _run_engines(simulation_options)
        name, columns = "policy", ENGINE
    print_table(name, [*runs, *_oracle(runs)], columns)
    for run in runs if all_figures else ():
        show(f"\n{run[name]}", run, None)
    if json is not None:
        json.write_text(json_format.dumps(runs[0] if len(runs) == 1 else runs, indent=2) + "\n")
    _report_speed(runs, time.perf_counter() - started)
    if plot == TERMINAL:
        print(f"\n{draw_text(runs)}")
    elif plot is not None:
        draw_runs(runs, Path(plot))


def _run_engines(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of each policy, on the same trace and device."""
    policies = str(options.pop("policy", "paged" if options.get("trace") else DEFAULT_POLICIES)).split(",")
    if options.setdefault("trace", DEFAULT_TRACE) in MADE_TRACES:
        raise ConfigError(
            f"trace is {options['trace']}, which is made for clusters; give the replicas with --cluster N"
        )
    every = [SimulationSettings(**options, policy=policy.strip()) for policy in policies]
    trace = read_trace(find_trace(every[0].trace, every[0].traces_dir))
    every = [_complete(settings, trace, options) for settings in every]
    first = every[0]
    model, device = find_model_shape(first.model), find_device(first.device)
    lengths = [row.prompt_tokens for row in trace.rows], [row.output_tokens for row in trace.rows]
    prompt, output = (sum(values) / len(values) for values in lengths)
    queue = "a queue that is always full" if first.saturate else "as they arrive"
    count = expected_requests(trace, first)
    what = f"{count:,} requests" if count else "requests"
    print(f"{what} of {first.trace}, {queue}; {prompt:,.0f} + {output:,.0f} tokens each")
    print(f"{model.name} on {device.name}, modelled: nothing here was measured\n")
    runs = []
    for settings in every:
        with _progress(settings.policy, expected_requests(trace, settings)) as progress:
            runs.append(run_simulation(trace, model, device, settings, progress))
    return runs


def _complete(settings: SimulationSettings, trace: Trace, given: dict[str, Any]) -> SimulationSettings:
    """The settings with defaults that follow from the trace: a queue that is always full where it has no arrivals, and
    a model with a context that holds its requests."""
    if not trace.has_arrivals and given.keys().isdisjoint(("rate", "saturate", "arrivals", "duration")):
        count = settings.num_requests or min(NUM_SATURATING, len(trace.rows))
        settings = replace(settings, saturate=True, num_requests=count)
    longest = max(row.prompt_tokens + row.output_tokens for row in trace.rows)
    if "model" not in given and longest > find_model_shape(settings.model).context_length:
        device = settings.device if "device" in given else LONG_DEVICE
        settings = replace(settings, model=LONG_MODEL, device=device)
    return settings


def _run_clusters(options: dict[str, Any], cluster_options: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of each way to route, on the same sessions."""
    ways = str(cluster_options.pop("routing", ClusterSettings().routing)).split(",")
    clusters = [ClusterSettings(**cluster_options, routing=way.strip()) for way in ways]
    given: dict[str, Any] = {"trace": AGENTS, "model": LONG_MODEL, "device": LONG_DEVICE, "block_size": 64} | options
    is_made = given["trace"] in MADE_TRACES
    if given["trace"] == AGENTS:
        given = {"rate": CLUSTER_RATE, "num_requests": NUM_SESSIONS} | given
    settings = SimulationSettings(**given)
    trace = None if is_made else read_trace(find_trace(settings.trace, settings.traces_dir))
    model, device = find_model_shape(settings.model), find_device(settings.device)
    runs = []
    for cluster in clusters:
        with _progress(cluster.routing, expected_turns(trace, settings)) as progress:
            runs.append(run_cluster(trace, model, device, settings, cluster, progress))
    first = runs[0]
    what = settings.trace
    if what == AGENTS:
        what = f"{settings.num_requests:,} session{'s' * (settings.num_requests != 1)} of agents"
    print(
        f"{what} on {clusters[0].cluster:,} replicas of {model.name}, each {first['num_devices']} × {device.name}, "
        "modelled\n"
    )
    return runs


def _oracle(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of oracles: one cache for all replicas that forgets nothing, and one of the size of all their caches.
    They have hits and no times."""
    if "oracle_hit_pct" not in runs[0]:
        return []
    everything, equal = runs[0]["oracle_hit_pct"], runs[0]["equal_oracle_hit_pct"]
    share = 100 * equal / everything if everything else 100.0
    return [
        {"routing": "oracle", "prefix_hit_pct": everything, "of_oracle_pct": 100.0},
        {"routing": "equal size", "prefix_hit_pct": equal, "of_oracle_pct": share},
    ]


def _report_speed(runs: Sequence[dict[str, Any]], seconds: float) -> None:
    steps, tokens = (sum(run[name] for run in runs) for name in ("steps", "generated_tokens"))
    print(
        f"simulated in {seconds:.1f} s: {steps / seconds:,.0f} steps/s, {tokens / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Progress | None]:
    """A progress bar on standard error; a line where that is no terminal."""
    if not sys.stderr.isatty():
        print(f"simulating {name}", file=sys.stderr, flush=True)
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
