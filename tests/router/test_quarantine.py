"""What one server learns for all: requests that engines die of. And streams between servers of two versions."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from quire.router.app import RouterApp
from quire.router.backends import Backends
from tests.router.fake_server import Asked, Died, FakeServer, marked
from tests.router.test_proxy import DONE, STREAM, WHOLE, count_on, route, text_of

QUARANTINED = b'{"error":{"message":"m","code":"request_quarantined"}}'


@pytest.mark.parametrize(("streams", "begun"), [(False, False), (True, False), (True, True)])
def test_what_one_server_quarantines_all_refuse(streams: bool, begun: bool) -> None:
    """Its engine died of the request; another seed, user or form of the answer is the same request."""
    script = text_of(marked("t0", 0), b"data: " + QUARANTINED + b"\n\n" + DONE) if begun else count_on
    servers = [FakeServer(script, refusal=None if begun else (400, QUARANTINED)) for _ in range(3)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        first = await client.post("/v1/completions", json={**STREAM, "stream": streams})
        assert "request_quarantined" in first.text
        assert first.status_code == (200 if begun else 400)
        for change in ({}, {"seed": 7}, {"user": "x", "stream": not streams}):
            again = await client.post("/v1/completions", json={**STREAM, "stream": streams, **change})
            assert (again.status_code, again.json()["error"]["code"]) == (400, "request_quarantined")
        assert sum(len(server.asked) for server in servers) == 1
        other = await client.post("/v1/completions", json={**STREAM, "prompt": "another"})
        assert "refused" not in other.text
        assert sum(len(server.asked) for server in servers) == 2

    route(servers, test)


@pytest.mark.parametrize("others", [("2", "1"), ("2", "2"), ("", "")])
def test_streams_go_on_at_a_server_of_the_same_version(others: tuple[str, str]) -> None:
    """Another version may give other tokens. It goes on only where no server of the same one is left."""
    others_are_up = asyncio.Event()

    async def dies_then(asked: Asked) -> AsyncIterator[bytes]:
        for token in range(3):
            yield marked(f"t{token}", token)
        await others_are_up.wait()
        raise Died

    servers = [FakeServer(dies_then, version="1"), *(FakeServer(count_on, version=version) for version in others)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        for server in servers[1:]:
            server.ready = 503
            await backends.look(backends.by_url[server.url])
        sending = asyncio.create_task(client.post("/v1/completions", json=STREAM))
        while not servers[0].asked:
            await asyncio.sleep(0.001)
        for server in servers[1:]:
            server.ready = 200
            await backends.look(backends.by_url[server.url])
        others_are_up.set()
        assert (await sending).content == WHOLE
        if "1" in others:
            assert [len(server.asked) for server in servers] == [1, 0, 1]
        assert app.proxy.counts.mixed_streams == ("1" not in others)

    route(servers, test)
