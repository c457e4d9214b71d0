"""run_cluster: one simulation of a cluster, from a trace, a model, a device and settings to its figures."""

from collections.abc import Iterator
from typing import Any

from quire.errors import ConfigError
from quire.simulation.arrivals import arrivals_of, expected_requests
from quire.simulation.baselines import Progress
from quire.simulation.cluster import ClusterSimulation
from quire.simulation.cluster_settings import AGENTS, GROUPS, ClusterSettings
from quire.simulation.cluster_workload import (
    AgentShape,
    GroupShape,
    Session,
    agent_sessions,
    group_sessions,
    trace_sessions,
)
from quire.simulation.devices import Device, fewest_devices
from quire.simulation.model_shapes import ModelShape
from quire.simulation.modelled_executor import ModelledExecutor
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import num_kv_slots
from quire.simulation.step_time import StepTime
from quire.simulation.trace import HASH_BLOCK_TOKENS, Trace

_DEFAULT_SESSIONS = 100
_NOT_IN_CLUSTERS = (
    *("policy", "scheduling_policy", "admission", "saturate", "warm_up", "n", "beam_width", "shared_prefix"),
    *("swap_space", "disk_cache_size", "step_failures", "slow_steps", "cancellations", "engine_deaths"),
)


def expected_turns(trace: Trace | None, settings: SimulationSettings) -> int | None:
    """How many requests a simulation has; None if arrivals decide it."""
    if trace is None:
        turns = AgentShape().num_turns if settings.trace == AGENTS else 1
        return turns * (settings.num_requests or _DEFAULT_SESSIONS)
    return expected_requests(trace, settings)


def run_cluster(
    trace: Trace | None,
    model: ModelShape,
    device: Device,
    settings: SimulationSettings,
    cluster: ClusterSettings,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Simulate a cluster on a trace, or if it is None on the one that `settings.trace` says how to make.

    Return the figures by name, ready for JSON. Raises `ConfigError` for settings that contradict the trace or that a
    cluster does not have.
    """
    _check(settings)
    num_devices = settings.num_devices or fewest_devices(model, device)
    if trace is None:
        sessions = _make_sessions(settings, cluster)
    else:
        sessions = trace_sessions(arrivals_of(trace, settings), HASH_BLOCK_TOKENS)
    step_time = StepTime(model, device, num_devices, attention_slowdown=settings.attention_slowdown)
    num_slots = num_kv_slots(model, device, num_devices, settings)
    simulation = ClusterSimulation(
        sessions,
        lambda: ModelledExecutor(step_time, seed=settings.seed),
        settings,
        cluster,
        num_blocks=num_slots // settings.block_size,
        max_model_len=settings.max_model_len or model.context_length,
    )
    simulation.run(on_progress)
    figures = simulation.result()
    hours = cluster.cluster * num_devices * figures["seconds"] / 3600
    good = figures["goodput_per_s"] * figures["seconds"]
    return {
        "routing": cluster.routing,
        "replicas": cluster.cluster,
        "trace": settings.trace if trace is None else trace.name,
        "model": model.name,
        "device": device.name,
        "num_devices": num_devices,
        "kv_slots": num_slots,
        "block_size": settings.block_size,
        "rate": settings.rate,
        "event_delay": cluster.event_delay,
        "seed": settings.seed,
        **figures,
        # Hours of one device for a thousand requests within the limits of goodput.
        "device_hours_per_1k": 1000 * hours / good if good else None,
    }


def _make_sessions(settings: SimulationSettings, cluster: ClusterSettings) -> Iterator[Session]:
    if settings.rate is None:
        raise ConfigError(f"{settings.trace} need a rate: sessions per second that begin; set rate")
    count = settings.num_requests or _DEFAULT_SESSIONS
    if settings.trace == GROUPS:
        return group_sessions(GroupShape(), count, settings.rate, settings.seed)
    return agent_sessions(AgentShape(num_kinds=cluster.num_kinds), count, settings.rate, settings.seed)


def _check(settings: SimulationSettings) -> None:
    """Raise `ConfigError` for options of one engine that a simulated cluster does not have."""
    default = SimulationSettings(trace=settings.trace)
    for name in _NOT_IN_CLUSTERS:
        if getattr(settings, name) != getattr(default, name):
            raise ConfigError(f"{name} is {getattr(settings, name)}; a simulated cluster lacks that: leave it out")
