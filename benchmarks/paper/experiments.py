"""The runs for each figure of the paper, and their coefficients.

The device is the paper's at data-sheet rates, with one property of the paper's software: the overhead of a step, which
was large in 2023. Two numbers of Fig. 13 give it by Little's law (batch = rate × tokens × step): 30.42 sequences at 2
requests/s of 338 tokens make steps of 45 ms, 132.44 at 30 of 58.45 make 75.5 ms. The roofline explains 28 and 31 ms of
those. The rest is a constant plus a share per sequence, the same for every system. So vLLM's batches in Fig. 13 do not
test the simulation; everything else does.
"""

import math
import multiprocessing
import random
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from quire.simulation.devices import DEVICES
from quire.simulation.model_shapes import MODEL_SHAPES
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.step_time import StepTime
from quire.simulation.trace import TRACES, Trace, TraceRow, find_trace, read_trace

THRESHOLD = 0.5
"""Largest mean normalised latency, in seconds per token, at which a rate counts as sustained."""
SECONDS = 600.0
"""Seconds of arrivals. The paper's runs last an hour (15 minutes for 175B)."""
ATTENTION_SLOWDOWN = 1.23
"""Overhead of the paged kernel: the middle of the 20 to 26 % in the paper's Fig. 18a."""
STEP_OVERHEAD, SEQUENCE_OVERHEAD = 0.0088, 0.00027
NAMES = {
    "paged": "Quire",
    "orca-oracle": "Orca (Oracle)",
    "orca-pow2": "Orca (Pow2)",
    "orca-max": "Orca (Max)",
    "fastertransformer": "FasterTransformer",
}
"""Policy → the paper's name for it."""
POLICIES = tuple(NAMES)
CHAT_LIMIT = 1024
"""Tokens of history and of output in the chat test."""
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COPY_SECONDS = 1e-5
"""Seconds of a small copy between device and host."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One set-up of Fig. 12, and the highest rate to try."""

    label: str
    model: str
    device: str
    trace: str
    highest_rate: float
    option: str = ""
    """The simulation option that the panel varies, and its value."""
    value: int = 0
    seconds: float = SECONDS


PANELS = (
    Panel("a", "OPT-13B", "A100-40GB", "sharegpt_papermean", 4.0),
    Panel("b", "OPT-66B", "A100-40GB", "sharegpt_papermean", 3.0),
    Panel("c", "OPT-175B", "A100-80GB", "sharegpt_papermean", 6.0),
    Panel("d", "OPT-13B", "A100-40GB", "alpaca_like", 60.0),
    Panel("e", "OPT-66B", "A100-40GB", "alpaca_like", 45.0),
    Panel("f", "OPT-175B", "A100-80GB", "alpaca_like", 60.0),
)
CHAT = Panel("chat", "OPT-13B", "A100-40GB", "sharegpt_turns", 2.0)
SHARING_SECONDS = 240.0
SHARING = tuple(
    Panel(f"{name} {width}", "OPT-13B", "A100-40GB", "alpaca_like", 60.0 / width, option, width, SHARING_SECONDS)
    for name, option in (("parallel", "n"), ("beam", "beam_width"))
    for width in (2, 4, 6)
)
"""Set-ups of Fig. 14."""
PREFIXES = tuple(
    Panel(f"prefix {length}", "LLaMA-13B", "A100-40GB", "wmt_like", 120.0, "shared_prefix", length, SHARING_SECONDS)
    for length in (80, 341)
)
"""Set-ups of Fig. 16: one and five examples before the sentence to translate."""
WMT_MEANS = (40, 40)
"""Tokens of a sentence and of its translation. The paper does not print them."""
BOUND = (PANELS[2], SHARING[-1], PREFIXES[-1])
FREED: dict[str, Any] = {"max_num_seqs": 1024, "sequence_overhead": 0.0}
"""Options that remove every bound but memory, for panels where a printed multiple does not come out."""
SAVINGS = (
    *(
        ("alpaca", option, width, rate)
        for option in ("n", "beam_width")
        for width, rate in ((2, 8.0), (4, 5.0), (6, 3.0))
    ),
    *(
        ("sharegpt", option, width, rate)
        for option in ("n", "beam_width")
        for width, rate in ((2, 1.0), (4, 0.5), (6, 0.4))
    ),
)
"""Fig. 15, and the text's figures for ShareGPT: trace, option, sequences, requests per second."""
TIERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("256 GiB of host memory", {"swap_space": 2**38}),
    ("1 TiB of host memory", {"swap_space": 2**40}),
    ("256 GiB and 4 TiB of disk at 50 GB/s", {"swap_space": 2**38, "disk_cache_size": 2**42, "disk_bandwidth": 5e10}),
    ("256 GiB and 4 TiB of disk at 6 GB/s", {"swap_space": 2**38, "disk_cache_size": 2**42, "disk_bandwidth": 6e9}),
)
POOLS = tuple(2**power for power in range(18, 24))


@dataclass(frozen=True, slots=True)
class Knee:
    """The sustained rate of a policy, and every (rate, normalised latency) tried to find it."""

    panel: Panel
    policy: str
    rate: float
    points: list[tuple[float, float]]


def simulated(panel: Panel, *, sequence_overhead: float = SEQUENCE_OVERHEAD, **options: Any) -> dict[str, Any]:
    """The figures of one run of a panel's set-up."""
    device = replace(DEVICES[panel.device], step_overhead=STEP_OVERHEAD, sequence_overhead=sequence_overhead)
    defaults: dict[str, Any] = {
        "attention_slowdown": ATTENTION_SLOWDOWN,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 2560,
    }
    if panel.option:
        defaults[panel.option] = panel.value
    if panel in PREFIXES:
        defaults["enable_prefix_caching"] = True  # a registered prefix is found by it; nothing else is shared
    settings = SimulationSettings(trace=panel.trace, **{**defaults, **options})
    return run_simulation(trace_of(panel), MODEL_SHAPES[panel.model], device, settings)


def trace_of(panel: Panel) -> Trace:
    """The panel's trace. Conversations keep only their last tokens, as in the paper's chat test."""
    if panel in PREFIXES:
        return _wmt_like()
    trace = read_trace(find_trace(panel.trace, TRACES))
    if panel.label != CHAT.label:
        return trace
    rows = [TraceRow(min(row.prompt_tokens, CHAT_LIMIT), min(row.output_tokens, CHAT_LIMIT)) for row in trace.rows]
    return replace(trace, rows=rows)


def _wmt_like(num_rows: int = 4000, sigma: float = 0.5) -> Trace:
    """A trace of sentences and translations of log-normal lengths."""
    rng = random.Random("wmt")
    means = [math.log(mean) - sigma**2 / 2 for mean in WMT_MEANS]
    lengths = [[max(1, round(rng.lognormvariate(mean, sigma))) for mean in means] for _ in range(num_rows)]
    return Trace("wmt_like", [TraceRow(sentence, translation) for sentence, translation in lengths])


def find_knee(panel: Panel, policy: str, options: dict[str, Any] | None = None) -> Knee:
    """The highest rate whose normalised latency stays below the threshold, to 2 %, by bisection of the logarithm."""
    low, high = panel.highest_rate / 64, panel.highest_rate
    points: list[tuple[float, float]] = []
    while high / low > 1.02:
        rate = (low * high) ** 0.5
        figures = simulated(panel, policy=policy, rate=rate, duration=panel.seconds, **options or {})
        latency = figures["normalized_latency_mean"]
        points.append((rate, latency))
        if latency <= THRESHOLD:
            low = rate
        else:
            high = rate
    return Knee(panel, policy, low, sorted(points))


def freed(panel: Panel) -> tuple[str, float]:
    """Label of a panel, and Quire's multiple of Orca (Oracle) on it when `FREED`."""
    quire, oracle = (find_knee(panel, policy, FREED).rate for policy in ("paged", "orca-oracle"))
    return panel.label, quire / oracle


def crowd(job: tuple[Panel, str, dict[str, Any]]) -> dict[str, Any]:
    """Sequences that run at once if the queue is always full."""
    panel, policy, options = job
    return simulated(panel, policy=policy, saturate=True, num_requests=300, **options)


def waste(policy: str) -> dict[str, Any]:
    """Fig. 2: a queue that is always full."""
    return simulated(PANELS[0], policy=policy, saturate=True, num_requests=8000)


def batch_sizes(job: tuple[Panel, str, float]) -> dict[str, Any]:
    """Fig. 13: the printed rates."""
    panel, policy, rate = job
    return simulated(panel, policy=policy, rate=rate, duration=900.0)


def sharing(job: tuple[str, str, int, float]) -> dict[str, Any]:
    """Fig. 15: memory saved by several sequences of a prompt."""
    name, option, width, rate = job
    panel = next(panel for panel in PANELS if panel.model == "OPT-13B" and panel.trace.startswith(name))
    return {**simulated(panel, **{option: width}, rate=rate, duration=300.0), "option": option, "width": width}


def block_sizes(job: tuple[Panel, int, float]) -> dict[str, Any]:
    """Fig. 18b: latency by block size, as far as memory determines it."""
    panel, block_size, rate = job
    return simulated(panel, block_size=block_size, rate=rate, duration=SECONDS)


def prefix_hits(job: tuple[int, str]) -> dict[str, Any]:
    """The prefix cache on Mooncake's conversations, for one size of the pool and the tiers below it."""
    num_slots, tiers = job
    settings = SimulationSettings(
        trace="mooncake_conversation",
        num_devices=8,
        kv_slots=num_slots,
        block_size=512,
        max_num_batched_tokens=8192,
        max_model_len=131072,
        **dict(TIERS)[tiers],
    )
    trace = read_trace(find_trace(settings.trace, TRACES))
    return {**run_simulation(trace, MODEL_SHAPES["Llama-3.1-8B"], DEVICES["H100"], settings), "tiers": tiers}


def swap_and_recompute(num_tokens: int, block_size: int) -> tuple[float, float]:
    """Fig. 19: seconds to restore `num_tokens` by swapping (out and in) and by recomputation.

    A block is not contiguous across layers, so each layer takes one copy for keys and one for values.
    """
    panel = PANELS[0]
    model, device = MODEL_SHAPES[panel.model], DEVICES[panel.device]
    blocks = -(-num_tokens // block_size)
    moved = blocks * block_size * model.kv_bytes_per_token / device.host_bandwidth
    swap = 2 * (2 * model.spec.num_layers * blocks * COPY_SECONDS + moved)
    pairs = num_tokens * (num_tokens + 1) / 2
    return swap, StepTime(model, device).seconds(1, num_tokens, num_tokens, pairs, 1)


def preempted(job: tuple[int, bool]) -> dict[str, Any]:
    """Fig. 19, end to end: near the sustained rate, preempted sequences are recomputed, or go to host memory and come
    back."""
    block_size, swaps = job
    options: dict[str, Any] = {"enable_prefix_caching": True, "swap_space": 2**36} if swaps else {}
    figures = simulated(PANELS[0], rate=2.3, duration=SECONDS, block_size=block_size, **options)
    return {**figures, "swaps": swaps}


Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of this module and its arguments."""


def jobs_of() -> dict[str, list[Job]]:
    """Every simulation by the name of its results, the longest first among the sustained rates."""
    sharegpt, alpaca = PANELS[0], PANELS[3]
    orcas = ("orca-max", "orca-pow2", "orca-oracle", "paged")
    knees = [(panel, policy) for panel in PANELS for policy in POLICIES]
    knees += [(panel, policy) for panel in (CHAT, *SHARING, *PREFIXES) for policy in orcas]
    sizes = [(p, size, r) for p, r in ((sharegpt, 2.2), (alpaca, 29.0)) for size in BLOCK_SIZES]
    return {
        "knees": [(find_knee, job) for job in sorted(knees, key=lambda job: -job[0].highest_rate)],
        "fig_2": [(waste, (policy,)) for policy in orcas],
        "fig_13": [
            (batch_sizes, ((p, policy, rate),)) for p, rate in ((sharegpt, 2.0), (alpaca, 30.0)) for policy in orcas
        ],
        "fig_15": [(sharing, (job,)) for job in SAVINGS],
        "fig_17": [(crowd, ((CHAT, policy, {}),)) for policy in orcas],
        "beams": [(crowd, ((SHARING[-1], policy, FREED),)) for policy in ("orca-oracle", "paged")],
        "fig_18": [(block_sizes, (job,)) for job in sizes],
        "preempted": [(preempted, ((size, swaps),)) for size in (16, 32, 64) for swaps in (True, False)],
        "bounds": [(freed, (panel,)) for panel in BOUND],
        "hits": [(prefix_hits, ((slots, name),)) for name, _ in TIERS for slots in POOLS],
    }


SECTIONS = {
    "fig2": ("fig_2",),
    "fig12": ("knees", "bounds"),
    "fig13": ("fig_13",),
    "fig14": ("knees", "bounds", "beams"),
    "fig15": ("fig_15",),
    "fig16": ("knees", "bounds"),
    "fig17": ("knees", "fig_17"),
    "fig18": ("fig_18",),
    "fig19": ("preempted",),
    "mooncake": ("hits",),
}
"""A section of the page → the results that it needs."""


def jobs_for(section: str) -> dict[str, list[Job]]:
    """The simulations of one section. Of the sustained rates only its own panels are looked for."""
    panels = {"fig12": PANELS, "fig14": SHARING, "fig16": PREFIXES, "fig17": (CHAT,)}.get(section, ())
    labels = {"fig12": "c", "fig14": "beam 6", "fig16": "prefix 341"}
    every = jobs_of()
    chosen = {name: every[name] for name in SECTIONS[section]}
    # Figure 14 is compared with basic sampling, panel (d).
    more = (PANELS[3],) if section == "fig14" else ()
    if "knees" in chosen:
        chosen["knees"] = [job for job in every["knees"] if job[1][0] in (*panels, *more)]
    if "bounds" in chosen:
        chosen["bounds"] = [job for job in every["bounds"] if job[1][0].label == labels[section]]
    return chosen


def _end_silently() -> None:
    """Let Ctrl-C end a process without a stack trace; its parent says what happened."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def run_jobs(jobs: dict[str, list[Job]], num_workers: int, report: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Run simulations on `num_workers` processes. The result does not depend on their number.

    `report` is called for every one that has ended, with how many have, how many there are, and what it was. Ctrl-C and
    an error end the processes at once.
    """
    total = sum(map(len, jobs.values()))
    with ProcessPoolExecutor(num_workers, initializer=_end_silently) as pool:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the processes can take it
        futures = {
            pool.submit(function, *arguments): (name, place)
            for name, each in jobs.items()
            for place, (function, arguments) in enumerate(each)
        }
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for count, future in enumerate(as_completed(futures), start=1):
                name, place = futures[future]
                future.result()
                report(count, total, f"{name} {place + 1} of {len(jobs[name])}")
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    results: dict[str, Any] = {name: [None] * len(each) for name, each in jobs.items()}
    for future, (name, place) in futures.items():
        results[name][place] = future.result()
    results["fig_19"] = [(size, *swap_and_recompute(256, size)) for size in BLOCK_SIZES]
    return results
