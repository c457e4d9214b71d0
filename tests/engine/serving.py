"""AsyncLLM with the bundled model, for tests: started, awaited, and shut down afterwards."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from quire import AsyncLLM, EngineConfig, RequestOutput, SamplingParams

OPTIONS: dict[str, Any] = {"num_blocks": 400, "max_num_seqs": 16, "threads": 1, "dtype": "float32", "spare": False}
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = ["ROMEO:", "First Citizen:\nBefore we proceed", "O", "What say you?"]

Test = Callable[[AsyncLLM], Awaitable[None]]


@contextlib.asynccontextmanager
async def running(report: Callable[[str], None] = lambda line: None, **options: Any) -> AsyncIterator[AsyncLLM]:
    engine = AsyncLLM(EngineConfig.from_options({**OPTIONS, **options}), report)
    await engine.start()
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.shutdown()


async def collect(engine: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> RequestOutput:
    total: RequestOutput | None = None
    async for delta in engine.generate(prompt, params, **options):
        if total is None:
            total = delta
        else:
            total.extend(delta)
    assert total is not None
    assert total.finished
    return total


async def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)


def run(test: Callable[..., Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with running(**options) as engine:
            await test(engine)

    asyncio.run(main())
