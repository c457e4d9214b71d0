"""run_simulation: one simulation, from a trace, a model, a device and settings to its figures."""

from typing import Any

from quire.errors import ConfigError
from quire.simulation.arrivals import Arrival, arrivals_of
from quire.simulation.baselines import BaselineSimulation, Progress
from quire.simulation.devices import Device, fewest_devices, kv_bytes_left
from quire.simulation.fastertransformer import FasterTransformerSimulation
from quire.simulation.measures import Measures
from quire.simulation.model_shapes import ModelShape
from quire.simulation.modelled_executor import ModelledExecutor, ModelledTiers
from quire.simulation.orca import OrcaSimulation
from quire.simulation.paged import PagedSimulation
from quire.simulation.settings import SimulationSettings
from quire.simulation.step_time import StepTime
from quire.simulation.trace import Trace, unbounded_hit_percent


def run_simulation(
    trace: Trace,
    model: ModelShape,
    device: Device,
    settings: SimulationSettings,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Run one simulation; return its figures by name, those of the set-up first, ready for JSON.

    Times are in seconds, shares in percent. Raises `ConfigError` for settings that contradict the trace, the model or
    the device. `settings.trace`, `settings.model` and `settings.device` are names only; the objects are used.
    """
    if trace.rows[0].arrival is None and not settings.saturate and settings.rate is None:
        raise ConfigError(f"trace {trace.name} holds no arrivals; set rate in requests per second, or saturate")
    num_devices = settings.num_devices or fewest_devices(model, device)
    num_slots = num_kv_slots(model, device, num_devices, settings)
    max_model_len = settings.max_model_len or model.context_length
    paged = settings.policy == "paged"
    measures = Measures(
        num_slots // settings.block_size * settings.block_size if paged else num_slots,
        of_allocated=paged,
        ttft_limit=settings.ttft_limit,
        tbt_limit=settings.tbt_limit,
        warm_up=settings.warm_up,
    )
    arrivals = arrivals_of(trace, settings)
    slowdown = settings.attention_slowdown if paged else 1.0
    step_time = StepTime(model, device, num_devices, attention_slowdown=slowdown)
    simulation: PagedSimulation | BaselineSimulation
    if paged:
        simulation = PagedSimulation(
            arrivals,
            ModelledExecutor(step_time, seed=settings.seed, tiers=_tiers(model, device, num_devices, settings)),
            measures,
            settings,
            num_slots=num_slots,
            max_model_len=max_model_len,
            block_bytes=model.block_bytes(settings.block_size),
            windows=model.kv_layout.windows,
        )
    else:
        if settings.shared_prefix:
            arrivals = (_with_prefix(arrival, settings.shared_prefix) for arrival in arrivals)
        batching = FasterTransformerSimulation if settings.policy == "fastertransformer" else OrcaSimulation
        simulation = batching(arrivals, step_time, measures, settings, num_slots=num_slots, max_model_len=max_model_len)
    simulation.run(on_progress)
    figures = simulation.result()
    return {
        "policy": settings.policy,
        "trace": trace.name,
        "model": model.name,
        "device": device.name,
        "num_devices": num_devices,
        "kv_slots": num_slots,
        "max_model_len": max_model_len,
        "block_size": settings.block_size if paged else None,
        "n": settings.n,
        "beam_width": settings.beam_width,
        "rate": settings.rate,
        "saturate": settings.saturate,
        "seed": settings.seed,
        "skipped_rows": trace.num_skipped,
        "requests": sum(figures[ending] for ending in ("finished", "failed", "cancelled", "refused")),
        **figures,
        # The first counts blocks, as descriptions of traces do, the second tokens, as prefix_hit_pct does.
        "unbounded_prefix_hit_pct": unbounded_hit_percent(trace.rows[: settings.num_requests]),
        "unbounded_prefix_hit_tokens_pct": unbounded_hit_percent(trace.rows[: settings.num_requests], of_tokens=True),
    }


def num_kv_slots(model: ModelShape, device: Device, num_devices: int, settings: SimulationSettings) -> int:
    """Tokens that the KV memory holds."""
    num_slots = settings.kv_slots
    if num_slots is None:
        memory = settings.kv_cache_memory or kv_bytes_left(model, device, num_devices)
        num_slots = memory // model.kv_bytes_per_token
        if settings.policy == "paged":  # slots of its blocks, which hold the layers of one KV group
            num_slots = memory // model.block_bytes(1)
    smallest = settings.block_size if settings.policy == "paged" else 1
    if num_slots < smallest:
        raise ConfigError(f"the KV memory holds {num_slots} tokens, less than a block of {smallest}; give it more")
    return num_slots


def _tiers(model: ModelShape, device: Device, num_devices: int, settings: SimulationSettings) -> ModelledTiers | None:
    if not settings.has_tiers:
        return None
    host_rate = num_devices * (device.host_bandwidth or device.bandwidth)
    block_bytes = model.block_bytes(settings.block_size)
    return ModelledTiers(block_bytes, host_rate=host_rate, disk_rate=settings.disk_bandwidth)


def _with_prefix(arrival: Arrival, num_tokens: int) -> Arrival:
    """The same request for a system without registered prefixes: its prompt contains them."""
    row = arrival.row
    return arrival._replace(row=row._replace(prompt_tokens=row.prompt_tokens + num_tokens))
