"""`quire generate`: continue one prompt on the terminal."""

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

from quire.cli.options import flags, split
from quire.config import EngineConfig
from quire.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Flags of `quire generate` that are fields of SamplingParams. A flag that is given overrides the model's value."""

    max_tokens: int = 256
    """Maximum number of tokens to generate."""
    temperature: float | None = None
    """0 is greedy. The defaults of this and of the next four come from the model's generation_config.json."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float | None = None
    """Above 1, tokens that already occurred become less likely."""
    stop: tuple[str, ...] = ()
    """A text that ends the output. Repeat for several."""
    seed: int | None = None
    """Seed of the sampling: the same seed gives the same text."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token."""


@flags(SamplingOptions, EngineConfig, without=frozenset())
def generate(prompt: str | None = None, *, verbose: bool = False, **options: Any) -> None:
    """Continue a prompt and print the text as it is generated.

    Parameters
    ----------
    prompt
        The text to continue; standard input if left out.
    verbose
        Show the memory plan and the phases of start-up.
    """
    sampling, engine_options = split(options, SamplingOptions, EngineConfig)
    config = EngineConfig.from_options({"disable_log_stats": True, **engine_options})
    values = {"max_tokens": SamplingOptions().max_tokens, **sampling}
    SamplingParams(**values)  # refuse wrong values before anything is loaded
    config.make_folders()
    if prompt is None and sys.stdin.isatty():
        print("quire: type the text to continue; Ctrl-D on an empty line ends it", file=sys.stderr)
    text = sys.stdin.read() if prompt is None else prompt
    asyncio.run(_stream(config, text, values, verbose=verbose))


async def _stream(config: EngineConfig, prompt: str, values: dict[str, Any], *, verbose: bool) -> None:
    from quire.engine.async_engine import AsyncLLM

    engine = AsyncLLM(config, report=lambda line: print(line, file=sys.stderr) if verbose else None)
    try:
        await engine.start(warm=False)  # one text needs neither chats nor grammars
        await engine.wait_ready()
        params = SamplingParams(**{**engine.default_params, **values})
        async for output in engine.generate(prompt, params):
            for sample in output.outputs:
                print(sample.text, end="", flush=True)
        print()
    finally:
        await engine.shutdown()
