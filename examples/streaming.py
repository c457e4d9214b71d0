"""Stream an answer from an engine in a child process, as the server does."""

import asyncio

from quire import AsyncLLM, EngineConfig, SamplingParams


async def main() -> None:
    engine = AsyncLLM(EngineConfig(max_num_seqs=16, kv_cache_memory=64 * 2**20))
    await engine.start()
    await engine.wait_ready()
    async for delta in engine.generate("JULIET:\n", SamplingParams(temperature=0.8, seed=2, max_tokens=48)):
        print(delta.outputs[0].text, end="", flush=True)
    print()
    await engine.shutdown()


asyncio.run(main())
