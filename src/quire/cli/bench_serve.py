"""`quire bench serve`: an open-loop load on any OpenAI-compatible server: requests arrive at a given rate."""

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from quire.cli.bench_workload import Workload, WorkloadOptions, check_counts, make_workload, show, spread_of
from quire.cli.http_client import Target, server_target
from quire.cli.options import OutputJson, flags
from quire.errors import ConfigError, QuireError


@dataclass(slots=True)
class _Outcome:
    """Times of one request, in seconds since it was sent."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    whole: float = 0.0
    num_input: int = 0
    num_output: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(WorkloadOptions):
    """Flags of `quire bench serve`."""

    num_prompts: int = 100
    """Requests to send."""
    base_url: str = "http://127.0.0.1:8000"
    """The server, with or without /v1."""
    model: str | None = None
    """The server's name for the model; its default if left out."""
    api_key: str | None = None
    """The server's API key."""
    max_len: int = 2048
    """Maximum of prompt and output together, for sharegpt and alpaca."""
    request_rate: float = float("inf")
    """Requests per second on average, as a Poisson process; inf sends all at once."""
    max_concurrency: int | None = None
    """Maximum number of requests in flight. Others wait in the client, so the load is no longer an open loop."""
    percentiles: tuple[float, ...] = (99.0,)
    """Percentiles to report for each time."""
    seed: int = 0
    """Seed of prompts and arrivals."""

    def __post_init__(self) -> None:
        WorkloadOptions.__post_init__(self)
        check_counts(max_len=self.max_len, max_concurrency=self.max_concurrency)
        if not self.request_rate > 0:
            raise ConfigError(f"request_rate is {self.request_rate}; it must be more than 0")
        wrong = [percent for percent in self.percentiles if not 0 <= percent <= 100]
        if wrong:
            raise ConfigError(f"percentiles has {wrong[0]:g}; each must be from 0 to 100")


@flags(LoadOptions, without=frozenset())
def serve(*, output_json: OutputJson = None, **options: Any) -> None:
    """Measure a running server: time to first token, between tokens and in total, and tokens per second."""
    load = LoadOptions(**options)
    work = make_workload(load, max_len=load.max_len, seed=load.seed)
    target = server_target(load.base_url, "/v1/completions", load.api_key)
    started = time.perf_counter()
    outcomes = asyncio.run(run_load(target, work, load.model, load.request_rate, load.max_concurrency, load.seed))
    result = load_figures(outcomes, time.perf_counter() - started, load.percentiles)
    failed = [outcome.error for outcome in outcomes if outcome.error]
    show(f"{load.base_url}, {load.num_prompts} requests at {load.request_rate:g} per second", result, output_json)
    if failed:
        raise QuireError(f"{len(failed)} of {load.num_prompts} requests failed, the first with: {failed[0]}")


async def run_load(
    target: Target, work: Workload, model: str | None, rate: float, max_concurrency: int | None, seed: int
) -> list[_Outcome]:
    """Send all requests of `work`, arriving at `rate` per second, and wait for their answers."""
    rng = random.Random(seed)
    places = asyncio.Semaphore(max_concurrency or len(work.prompts))
    tasks = []
    due = time.perf_counter()
    for prompt, length in zip(work.prompts, work.output_lens, strict=True):
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": length,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if model is not None:
            body["model"] = model
        tasks.append(asyncio.create_task(_request(target, body, places)))
        # Add to the time due, not to the present: late wake-ups must not lower the rate.
        due += rng.expovariate(rate) if rate != float("inf") else 0.0
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return list(await asyncio.gather(*tasks))


async def _request(target: Target, body: dict[str, Any], places: asyncio.Semaphore) -> _Outcome:
    outcome = _Outcome()
    async with places:
        started = last = time.perf_counter()
        try:
            async with aclosing(target.events(body)) as events:
                async for event in events:
                    now = time.perf_counter()
                    if event.get("usage"):
                        outcome.num_input = event["usage"]["prompt_tokens"]
                        outcome.num_output = event["usage"]["completion_tokens"]
                    if not event.get("choices"):
                        continue
                    if outcome.first:
                        outcome.gaps.append(now - last)
                    else:
                        outcome.first = now - started
                    last = now
        except QuireError as error:
            outcome.error = str(error)
        outcome.whole = last - started
    return outcome


def load_figures(outcomes: list[_Outcome], duration: float, percentiles: tuple[float, ...]) -> dict[str, Any]:
    """The figures, with the names of `vllm bench serve`."""
    done = [outcome for outcome in outcomes if not outcome.error and outcome.first]
    num_input = sum(outcome.num_input for outcome in done)
    num_output = sum(outcome.num_output for outcome in done)
    per_token = [(o.whole - o.first) / (o.num_output - 1) for o in done if o.num_output > 1]
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        **spread_of("ttft", [outcome.first for outcome in done], percentiles),
        **spread_of("tpot", per_token, percentiles),
        **spread_of("itl", [gap for outcome in done for gap in outcome.gaps], percentiles),
        **spread_of("e2el", [outcome.whole for outcome in done], percentiles),
    }
