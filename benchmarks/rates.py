"""Tokens per CPU second of an engine: one stream, 16 streams, and a long prompt.

Each rate of decoding is the difference of two runs of different lengths, so loading and warming up do not count. CPU
seconds, unlike seconds, mean the same on a machine that other work shares.
"""

from collections.abc import Callable

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
