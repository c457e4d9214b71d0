"""What the benchmarks ask, prompts of random tokens with lengths of a named distribution; and figures of what came."""

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

FIRST_TOKEN, LAST_TOKEN = 3, 250
"""Random prompts use these ids only: every vocabulary has them, and a server's need not be known."""

MEAN_LENGTHS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}
"""Input and output tokens on average, as the PagedAttention paper gives them (its Fig. 11)."""
_SPREAD = 1.0
"""Sigma of the log-normal lengths."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, and how many tokens to generate for each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))


def make_workload(
    dataset: str,
    *,
    num_prompts: int,
    input_len: int,
    output_len: int,
    range_ratio: float,
    max_len: int,
    seed: int,
) -> Workload:
    """`random` takes lengths within `range_ratio` of those given; the others draw lengths like their namesake's."""
    draw = random.Random(seed)
    if dataset == "random":
        inputs = [_around(draw, input_len, range_ratio) for _ in range(num_prompts)]
        outputs = [_around(draw, output_len, range_ratio) for _ in range(num_prompts)]
    elif dataset in MEAN_LENGTHS:
        mean_input, mean_output = MEAN_LENGTHS[dataset]
        inputs = [_log_normal(draw, mean_input, max_len // 2) for _ in range(num_prompts)]
        outputs = [_log_normal(draw, mean_output, max_len - max_len // 2) for _ in range(num_prompts)]
    else:
        raise ConfigError(f"dataset is {dataset!r}; it must be one of random, {', '.join(MEAN_LENGTHS)}")
    prompts = [[draw.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)] for length in inputs]
    return Workload(prompts, outputs)


def spread_of(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles in milliseconds, under vLLM's names: mean_ttft_ms, p99_ttft_ms."""
    if not seconds:
        return {}
    values = sorted(second * 1000 for second in seconds)
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        **{f"p{percent:g}_{name}_ms": percentile(values, percent) for percent in percentiles},
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the ordered values lie, interpolated."""
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def show(title: str, result: dict[str, Any], output_json: Path | None) -> None:
    """Print figures in two columns, lists left out; write all of them to `output_json`."""
    print(title)
    for name, value in result.items():
        if isinstance(value, float):
            print(f"  {name:<32} {value:>14,.3f}")
        elif not isinstance(value, list | dict):
            print(f"  {name:<32} {value!s:>14}")
    if output_json is not None:
        output_json.write_text(json.dumps(result, indent=2) + "\n")


def _around(draw: random.Random, length: int, range_ratio: float) -> int:
    return max(1, draw.randint(math.floor(length * (1 - range_ratio)), math.ceil(length * (1 + range_ratio))))


def _log_normal(draw: random.Random, mean: float, most: int) -> int:
    return max(1, min(most, round(draw.lognormvariate(math.log(mean) - _SPREAD**2 / 2, _SPREAD))))
