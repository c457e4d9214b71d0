"""What is run for each figure of the paper, and with which coefficients.

The device is the paper's, with data-sheet rates, and one thing of its software: what a step costs besides
computing, which was much in 2023. Two numbers of Fig. 13 give it by Little's law (batch = rate × tokens × step):
30.42 sequences at 2 requests/s of 338 tokens make steps of 45 ms, 132.44 at 30 of 58.45 make 75.5 ms. The roofline
explains 28 and 31 ms of those; the rest is taken as a constant and a share per sequence, the same for every system. So
vLLM's batches in Fig. 13 are no test of the simulation; everything else is.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quire.simulation.devices import DEVICES
from quire.simulation.model_shapes import MODEL_SHAPES
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.step_time import StepTime
from quire.simulation.trace import Trace, TraceRow, find_trace, read_trace

TRACES = Path(__file__).parent / "traces"
THRESHOLD = 0.5
"""Seconds per token of mean normalised latency up to which a rate counts as sustained."""
SECONDS = 600.0
"""Of arrivals; the paper's runs last an hour (15 minutes for 175B)."""
ATTENTION_SLOWDOWN = 1.23
"""Of the paged kernel: the middle of the 20 to 26 % of the paper's Fig. 18a."""
STEP_OVERHEAD, SEQUENCE_OVERHEAD = 0.0088, 0.00027
POLICIES = ("paged", "orca-oracle", "orca-pow2", "orca-max", "fastertransformer")
CHAT_LIMIT = 1024
"""Tokens of history and of output in the chat test."""
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COPY_SECONDS = 1e-5
"""One small copy between device and host, whatever its size."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One set-up of Fig. 12, and the highest rate that is tried."""

    label: str
    model: str
    device: str
    trace: str
    highest_rate: float


PANELS = (
    Panel("a", "OPT-13B", "A100-40GB", "sharegpt_papermean", 4.0),
    Panel("b", "OPT-66B", "A100-40GB", "sharegpt_papermean", 3.0),
    Panel("c", "OPT-175B", "A100-80GB", "sharegpt_papermean", 6.0),
    Panel("d", "OPT-13B", "A100-40GB", "alpaca_like", 60.0),
    Panel("e", "OPT-66B", "A100-40GB", "alpaca_like", 45.0),
    Panel("f", "OPT-175B", "A100-80GB", "alpaca_like", 60.0),
)
CHAT = Panel("chat", "OPT-13B", "A100-40GB", "sharegpt_turns", 2.0)


@dataclass(frozen=True, slots=True)
class Knee:
    """The sustained rate of a policy, and every (rate, normalised latency) that was tried to find it."""

    panel: Panel
    policy: str
    rate: float
    points: list[tuple[float, float]]


def simulated(panel: Panel, **options: Any) -> dict[str, Any]:
    """The figures of one run of a panel's set-up."""
    device = replace(DEVICES[panel.device], step_overhead=STEP_OVERHEAD, sequence_overhead=SEQUENCE_OVERHEAD)
    defaults = {
        "attention_slowdown": ATTENTION_SLOWDOWN,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 2560,
    }
    settings = SimulationSettings(trace=panel.trace, **{**defaults, **options})
    return run_simulation(trace_of(panel), MODEL_SHAPES[panel.model], device, settings)


def trace_of(panel: Panel) -> Trace:
    """The panel's trace; of conversations the last tokens only, as the paper's chat test has it."""
    trace = read_trace(find_trace(panel.trace, TRACES))
    if panel.label != CHAT.label:
        return trace
    rows = [TraceRow(min(row.prompt_tokens, CHAT_LIMIT), min(row.output_tokens, CHAT_LIMIT)) for row in trace.rows]
    return replace(trace, rows=rows)


def find_knee(panel: Panel, policy: str) -> Knee:
    """The highest rate whose normalised latency stays below the threshold, to 2 %, by bisection of the logarithm."""
    low, high = panel.highest_rate / 64, panel.highest_rate
    points: list[tuple[float, float]] = []
    while high / low > 1.02:
        rate = (low * high) ** 0.5
        latency = simulated(panel, policy=policy, rate=rate, duration=SECONDS)["normalized_latency_mean"]
        points.append((rate, latency))
        if latency <= THRESHOLD:
            low = rate
        else:
            high = rate
    return Knee(panel, policy, low, sorted(points))


def waste(policy: str) -> dict[str, Any]:
    """Fig. 2: a queue that is always full."""
    return simulated(PANELS[0], policy=policy, saturate=True, num_requests=8000)


def batch_sizes(job: tuple[Panel, str, float]) -> dict[str, Any]:
    """Fig. 13: the printed rates."""
    panel, policy, rate = job
    return simulated(panel, policy=policy, rate=rate, duration=900.0)


def sharing(job: tuple[Panel, int, float]) -> dict[str, Any]:
    """Fig. 15a: parallel sampling."""
    panel, num_samples, rate = job
    return simulated(panel, n=num_samples, rate=rate, duration=300.0)


def block_sizes(job: tuple[Panel, int, float]) -> dict[str, Any]:
    """Fig. 18b: what the size of a block does to the latency, as far as memory goes."""
    panel, block_size, rate = job
    return simulated(panel, block_size=block_size, rate=rate, duration=SECONDS)


def prefix_hits(num_slots: int) -> dict[str, Any]:
    """The prefix cache on Mooncake's conversations, for one size of the pool."""
    settings = SimulationSettings(
        trace="mooncake_conversation",
        num_devices=8,
        kv_slots=num_slots,
        block_size=512,
        max_num_batched_tokens=8192,
        max_model_len=131072,
    )
    trace = read_trace(find_trace(settings.trace, TRACES))
    return run_simulation(trace, MODEL_SHAPES["Llama-3.1-8B"], DEVICES["H100"], settings)


def swap_and_recompute(num_tokens: int, block_size: int) -> tuple[float, float]:
    """Fig. 19: seconds to bring `num_tokens` back by swapping (out and in), and by computing them anew.

    A block is not contiguous across layers, so it takes a copy per layer for keys and one for values.
    """
    panel = PANELS[0]
    model, device = MODEL_SHAPES[panel.model], DEVICES[panel.device]
    blocks = -(-num_tokens // block_size)
    moved = blocks * block_size * model.kv_bytes_per_token / device.host_bandwidth
    swap = 2 * (2 * model.num_layers * blocks * COPY_SECONDS + moved)
    pairs = num_tokens * (num_tokens + 1) / 2
    return swap, StepTime(model, device).seconds(1, num_tokens, num_tokens, pairs, 1)


def run_all(num_workers: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Every experiment, on `num_workers` processes; deterministic whatever their number."""
    sharegpt, alpaca = PANELS[0], PANELS[3]
    orcas = ("orca-max", "orca-pow2", "orca-oracle", "paged")
    with ProcessPoolExecutor(num_workers) as pool:
        jobs = [(panel, policy) for panel in PANELS for policy in POLICIES]
        jobs += [(CHAT, policy) for policy in orcas]
        # The longest first, so that none is left over at the end.
        knees = pool.map(find_knee, *zip(*sorted(jobs, key=lambda job: -job[0].highest_rate), strict=True))
        fig_2 = pool.map(waste, orcas)
        fig_13 = pool.map(
            batch_sizes, [(p, policy, r) for p, r in ((sharegpt, 2.0), (alpaca, 30.0)) for policy in orcas]
        )
        fig_15 = pool.map(sharing, [(alpaca, n, rate) for n, rate in ((2, 8.0), (4, 5.0), (6, 3.0))])
        sizes = [(p, size, r) for p, r in ((sharegpt, 2.2), (alpaca, 29.0)) for size in BLOCK_SIZES]
        fig_18 = pool.map(block_sizes, sizes)
        hits = pool.map(prefix_hits, (2**18, 2**19, 2**20, 2**21, 2**22, 2**23))
        results: dict[str, Any] = {}
        for name, what in (
            ("knees", knees),
            ("fig_2", fig_2),
            ("fig_13", fig_13),
            ("fig_15", fig_15),
            ("fig_18", fig_18),
            ("hits", hits),
        ):
            results[name] = list(what)
            report(f"{name} done")
    results["fig_19"] = [(size, *swap_and_recompute(256, size)) for size in BLOCK_SIZES]
    return results
