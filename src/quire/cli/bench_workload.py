"""Workloads of `quire bench`: prompts of random tokens with given or distributed lengths. Also prints the figures."""

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.simulation.measures import percentile

FIRST_TOKEN, LAST_TOKEN = 3, 250
"""Random prompts use only these token ids: every vocabulary has them, and a server's vocabulary is unknown."""

MEAN_LENGTHS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}
"""Mean input and output tokens, from Fig. 11 of the PagedAttention paper."""
_SPREAD = 1.0
"""Sigma of the log-normal lengths."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, and the number of tokens to generate for each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """Lengths of the prompts and outputs of a benchmark. Its fields are flags of `quire bench`."""

    dataset: str = "random"
    """random, or lengths distributed as in sharegpt or alpaca."""
    num_prompts: int = 64
    """Number of prompts."""
    input_len: int = 128
    """Tokens per prompt, for the random dataset."""
    output_len: int = 128
    """Tokens generated per sample, for the random dataset."""
    range_ratio: float = 0.0
    """Random lengths differ from the given ones by at most this fraction."""

    def __post_init__(self) -> None:
        check_counts(num_prompts=self.num_prompts, input_len=self.input_len, output_len=self.output_len)
        if self.dataset not in ("random", *MEAN_LENGTHS):
            raise ConfigError(f"dataset is {self.dataset!r}; it must be one of random, {', '.join(MEAN_LENGTHS)}")
        if not 0 <= self.range_ratio <= 1:
            raise ConfigError(f"range_ratio is {self.range_ratio}; it must be from 0 to 1")


def check_counts(**counts: int | None) -> None:
    """Raise `ConfigError` for a count below 1; None is no count."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1")


def make_workload(options: WorkloadOptions, *, max_len: int, seed: int) -> Workload:
    """Random prompts of the lengths that `options` describe; of a named dataset, prompt + output ≤ `max_len`."""
    rng, num_prompts = random.Random(seed), options.num_prompts
    if options.dataset == "random":
        inputs = [_around(rng, options.input_len, options.range_ratio) for _ in range(num_prompts)]
        outputs = [_around(rng, options.output_len, options.range_ratio) for _ in range(num_prompts)]
    else:
        mean_input, mean_output = MEAN_LENGTHS[options.dataset]
        inputs = [_log_normal(rng, mean_input, max_len // 2) for _ in range(num_prompts)]
        outputs = [_log_normal(rng, mean_output, max_len - max_len // 2) for _ in range(num_prompts)]
    prompts = [[rng.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)] for length in inputs]
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


def show(title: str, result: dict[str, Any], output_json: Path | None) -> None:
    """Print the figures in two columns, without lists. Write all of them to `output_json`."""
    print(title)
    for name, value in result.items():
        if isinstance(value, float):
            print(f"  {name:<32} {value:>14,.3f}")
        elif not isinstance(value, list | dict):
            print(f"  {name:<32} {value!s:>14}")
    if output_json is not None:
        output_json.write_text(json.dumps(result, indent=2) + "\n")


def _around(rng: random.Random, length: int, range_ratio: float) -> int:
    return max(1, rng.randint(math.floor(length * (1 - range_ratio)), math.ceil(length * (1 + range_ratio))))


def _log_normal(rng: random.Random, mean: float, longest: int) -> int:
    return max(1, min(longest, round(rng.lognormvariate(math.log(mean) - _SPREAD**2 / 2, _SPREAD))))
