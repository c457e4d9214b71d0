"""`quire generate`: continue one prompt on the terminal."""

import asyncio
import sys
from typing import Any

from quire.cli.options import flags
from quire.config import EngineConfig
from quire.sampling_params import SamplingParams


@flags(EngineConfig, without=frozenset({"seed"}))
def generate(
    prompt: str | None = None,
    *,
    max_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: tuple[str, ...] = (),
    seed: int | None = None,
    ignore_eos: bool = False,
    verbose: bool = False,
    **options: Any,
) -> None:
    """Continue a prompt, as it comes.

    Parameters
    ----------
    prompt
        The text to continue; standard input if left out.
    max_tokens
        Most tokens to generate.
    temperature
        0 is greedy; the model's own default if left out, as with the following.
    top_p
        Keep the smallest set of most likely tokens whose probabilities sum to at least this.
    top_k
        Keep the k most likely tokens.
    min_p
        Keep tokens at least this fraction as likely as the most likely one.
    repetition_penalty
        Makes tokens that occurred less likely where it is more than 1.
    stop
        A text that ends the output; repeat for several.
    seed
        Same seed, same text.
    ignore_eos
        Go on after the end of sequence.
    verbose
        Show the memory plan and the phases of start-up.
    """
    config = EngineConfig.from_options({"disable_log_stats": True, **options})
    chosen: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    fixed: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "seed": seed, "ignore_eos": ignore_eos}
    given = {name: value for name, value in chosen.items() if value is not None}
    SamplingParams(**fixed, **given)  # a wrong one is answered before anything is loaded
    text = sys.stdin.read() if prompt is None else prompt
    asyncio.run(_stream(config, text, {**fixed, **given}, verbose=verbose))


async def _stream(config: EngineConfig, prompt: str, values: dict[str, Any], *, verbose: bool) -> None:
    from quire.engine.async_engine import AsyncLLM

    engine = AsyncLLM(config, report=lambda line: print(line, file=sys.stderr) if verbose else None)
    try:
        await engine.start()
        await engine.wait_ready()
        params = SamplingParams(**{**engine.default_params, **values})
        async for output in engine.generate(prompt, params):
            for sample in output.outputs:
                print(sample.text, end="", flush=True)
        print()
    finally:
        await engine.shutdown()
