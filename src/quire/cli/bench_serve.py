"""`quire bench serve`: load on any OpenAI-compatible server, requests arriving whether or not earlier ones are done."""

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.bench_workload import Workload, make_workload, show, spread_of
from quire.cli.http_client import Target
from quire.cli.options import OutputJson
from quire.errors import ConfigError, QuireError


@dataclass(slots=True)
class _Outcome:
    """One request: when what came, in seconds since it was sent."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    whole: float = 0.0
    num_input: int = 0
    num_output: int = 0
    error: str = ""


def serve(
    *,
    base_url: str = "http://127.0.0.1:8000",
    model: str | None = None,
    api_key: Annotated[str | None, Parameter(env_var="QUIRE_API_KEY")] = None,
    dataset: str = "random",
    num_prompts: int = 100,
    input_len: int = 128,
    output_len: int = 128,
    range_ratio: float = 0.0,
    max_len: int = 2048,
    request_rate: float = float("inf"),
    max_concurrency: int | None = None,
    percentiles: tuple[float, ...] = (99.0,),
    seed: int = 0,
    output_json: OutputJson = None,
) -> None:
    """Measure a running server: time to first token, between tokens and in all, and tokens per second.

    Parameters
    ----------
    base_url
        The server, without /v1.
    model
        The server's name for the model; its default if left out.
    api_key
        The server's API key.
    dataset
        random, or lengths like those of sharegpt or alpaca.
    num_prompts
        Requests to send.
    input_len
        Tokens per prompt, where the dataset is random.
    output_len
        Tokens generated per request, where the dataset is random.
    range_ratio
        Random lengths are within this share of those given.
    max_len
        Prompt and output together stay below this, where the dataset is not random.
    request_rate
        Requests per second on average, arriving as a Poisson process; inf sends all at once.
    max_concurrency
        Most requests under way at once; those beyond wait here, which is then no longer an open loop.
    percentiles
        Percentiles to report of each time.
    seed
        Of prompts and arrivals.
    """
    if not request_rate > 0:
        raise ConfigError(f"request_rate is {request_rate}; it must be more than 0")
    work = make_workload(
        dataset,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        max_len=max_len,
        seed=seed,
    )
    target = Target(f"{base_url.rstrip('/')}/v1/completions", api_key)
    started = time.perf_counter()
    outcomes = asyncio.run(run_load(target, work, model, request_rate, max_concurrency, seed))
    result = load_figures(outcomes, time.perf_counter() - started, percentiles)
    failed = [outcome.error for outcome in outcomes if outcome.error]
    show(f"{base_url}, {num_prompts} requests at {request_rate:g} per second", result, output_json)
    if failed:
        raise QuireError(f"{len(failed)} of {num_prompts} requests failed, the first with: {failed[0]}")


async def run_load(
    target: Target, work: Workload, model: str | None, rate: float, max_concurrency: int | None, seed: int
) -> list[_Outcome]:
    draw = random.Random(seed)
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
        # Against the time due, not the last arrival: a late wake-up must not thin the load.
        due += draw.expovariate(rate) if rate != float("inf") else 0.0
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
    """Under the names of `vllm bench serve`."""
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
