"""What to expect of a model on a device (users at once, tokens per second, latencies), from simulations.

Users are a closed loop: each sends its next request when it has the answer to the last one, so as many requests run at
any time as there are users. The first answers have all lengths, so that prompts do not come in waves later. Measuring
begins when each user has one answer, since all prompts come at once at the beginning.
"""

from dataclasses import dataclass, replace
from typing import Any

from quire.kv_groups import most_blocks
from quire.simulation.devices import Device
from quire.simulation.model_shapes import ModelShape
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.trace import Trace, TraceRow

ROUNDS = 2
"""Measured requests per user."""
MAX_TOKENS = 50_000
"""Most tokens measured in one simulation, unless one request per user has more; it then takes about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """The sizes of a memory plan that a scheduler sees: tokens, blocks and sequences."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    windows: tuple[int, ...] = (0,)
    """The window of each KV group."""

    def num_users(self, context: int, *, of_memory: bool = False) -> int:
        """How many sequences of `context` tokens run at once; with `of_memory` how many the blocks would hold."""
        blocks = sum(most_blocks(context, window, self.block_size) for window in self.windows)
        fitting = self.num_blocks // blocks
        return fitting if of_memory else min(self.max_num_seqs, fitting)


_FIGURES = (
    "tokens_per_s",
    "requests_per_s",
    "ttft_p50",
    "ttft_p99",
    "tbt_p50",
    "tbt_p99",
    "mean_batch",
    "preemptions",
    "prefix_hit_pct",
)


def expect_users(
    model: ModelShape, device: Device, num_devices: int, sizes: EngineSizes, *, users: int, prompt: int, output: int
) -> dict[str, Any]:
    """Figures of `users` that send prompts of `prompt` tokens, all different, and want `output` tokens each.

    Times in seconds; tokens_per_s counts generated ones. Raises `ConfigError` for what cannot be simulated.
    """
    rounds = max(1, min(ROUNDS, MAX_TOKENS // (users * output)))
    # The first prompts are one token long: computing them delays nothing, so the first answers end evenly spread.
    first = [TraceRow(1, max(1, output * (user + 1) // users)) for user in range(users)]
    # Users send further requests while the last measured ones wait for their answers.
    trace = Trace("users", first + [TraceRow(prompt, output)] * (users * (rounds + 2)))
    settings = _settings(
        trace, num_devices, replace(sizes, max_num_seqs=users), num_requests=users * (rounds + 1), warm_up=users
    )
    figures = _simulate(trace, model, device, settings)
    return {"users": users, "prompt": prompt, "output": output, **figures}


def expect_trace(
    trace: Trace, model: ModelShape, device: Device, num_devices: int, sizes: EngineSizes
) -> dict[str, Any]:
    """Figures of a trace with its own arrivals, or of a queue that is always full where it has none."""
    settings = _settings(trace, num_devices, sizes)
    figures = _simulate(trace, model, device, settings)
    return {"trace": trace.name, "saturate": settings.saturate, **figures}


def _settings(
    trace: Trace, num_devices: int, sizes: EngineSizes, *, num_requests: int | None = None, warm_up: int = 0
) -> SimulationSettings:
    """The engine of `sizes` under a trace with its own arrivals, or under a queue that is always full."""
    return SimulationSettings(
        trace=trace.name,
        num_devices=num_devices,
        kv_slots=sizes.num_blocks * sizes.block_size,
        block_size=sizes.block_size,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        saturate=not trace.has_arrivals,
        num_requests=num_requests,
        warm_up=warm_up,
    )


def _simulate(trace: Trace, model: ModelShape, device: Device, settings: SimulationSettings) -> dict[str, Any]:
    figures = run_simulation(trace, model, device, settings)
    return {name: figures[name] for name in _FIGURES}
