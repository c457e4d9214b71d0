"""Tokens per CPU second of an engine: one stream, 16 streams, and a long prompt.

Each rate of decoding is the difference of two runs of different lengths, so loading and warming up do not count. CPU
seconds, unlike seconds, mean the same on a machine that other work shares.
"""

import os
import statistics
from collections.abc import Callable, Mapping

STREAM, STREAMS, PREFILL = "one stream", "16 streams", "prefill of 2,048"
NUM_STREAMS = 16
PROMPT_TOKENS, PREFILL_TOKENS = 16, 2048
LONG, SHORT = 48, 16
"""Output tokens of the two runs."""

Rate = Callable[[], float]
"""Measures once."""


def rates_of(run: Callable[[int, int, int], float]) -> dict[str, Rate]:
    """Name → rate. `run` takes a number of prompts, the tokens of each and the tokens of each answer, and returns the
    CPU seconds of all at once."""

    def decode(num_prompts: int) -> float:
        longer, shorter = (run(num_prompts, PROMPT_TOKENS, num_outputs) for num_outputs in (LONG, SHORT))
        return num_prompts * (LONG - SHORT) / (longer - shorter)

    return {
        STREAM: lambda: decode(1),
        STREAMS: lambda: decode(NUM_STREAMS),
        PREFILL: lambda: PREFILL_TOKENS / run(1, PREFILL_TOKENS, 1),
    }


def print_in_turns(what: str, rates: Mapping[str, Rate], turns: int) -> None:
    """Measure each engine once a turn. Print a line for each: its rate, and the first engine's rate over it."""
    found = {engine: list[float]() for engine in rates}
    for _ in range(turns):
        for engine, measure in rates.items():
            found[engine].append(measure())
    first = next(iter(found.values()))
    for engine, values in found.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(first, values, strict=True))
        print(
            f"{what}, {engine}: {statistics.median(values):.1f} tokens per CPU second, {ratio:.2f}; load average "
            f"{os.getloadavg()[0]:.1f}",
            flush=True,
        )
