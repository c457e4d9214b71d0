"""A router that is stopped, over a real socket."""

import asyncio
import gc
import os
import signal
import warnings

import httpx

from quire.router.serve import http_settings, serve
from quire.router.settings import RouterSettings
from quire.server.sockets import bind, url_of
from tests.router.fake_server import FakeServer
from tests.router.test_proxy import STREAM, WHOLE, count_after

NUM_STREAMS = 50


def test_a_stopped_router_ends_its_streams_first() -> None:
    """SIGTERM with fifty streams: each ends whole, and a new connection is refused."""
    gate = asyncio.Event()

    async def run() -> None:
        async with FakeServer(count_after(gate)).running() as one, FakeServer(count_after(gate)).running() as other:
            settings = RouterSettings(backends=(one.url, other.url), port=0)
            listener = bind(http_settings(settings))
            url = url_of(listener)
            lines: list[str] = []
            ready = asyncio.Event()

            def report(line: str) -> None:
                lines.append(line)
                if line.startswith("ready"):
                    ready.set()

            serving = asyncio.create_task(serve(settings, listener, report=report))
            await ready.wait()
            async with httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=None)) as client:
                asking = [asyncio.create_task(client.post("/v1/completions", json=STREAM)) for _ in range(NUM_STREAMS)]
                while len(one.asked) + len(other.asked) < NUM_STREAMS:
                    await asyncio.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)
                while not any(line.startswith("stopping") for line in lines):
                    await asyncio.sleep(0.01)
                late = await _late(client)
                assert late in (None, 503)
                assert not serving.done()
                gate.set()
                answers = [await each for each in asking]
                assert {answer.content for answer in answers} == {WHOLE}
                assert await serving, "all requests could finish"

    asyncio.run(asyncio.wait_for(run(), 60))
    with warnings.catch_warnings():  # on a busy machine httpx leaves some idle connections to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def _late(client: httpx.AsyncClient) -> int | None:
    """The status that a request gets now; None if it cannot connect."""
    try:
        return (await client.post("/v1/completions", json=STREAM)).status_code
    except httpx.TransportError:
        return None
