"""Prompts that one server computes for another: which do, and that nothing is lost where it goes wrong."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from quire.router.app import RouterApp
from quire.router.backends import Backends
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES
from tests.router.fake_server import FakeServer
from tests.router.test_proxy import STREAM, WHOLE, count_on


def ask(
    prefill: FakeServer, decode: FakeServer, spoil: Callable[[], None] = lambda: None, **options: Any
) -> dict[str, Any]:
    """Send a stream through a router, whose state this returns. The prompts of fake servers have 40 tokens."""

    async def run() -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            for server in (prefill, decode):
                await stack.enter_async_context(server.running())
            options.setdefault("prefill_min_tokens", 40)
            settings = RouterSettings(decode=decode.url, prefill=prefill.url, **options)
            fleet = Fleet(POLICIES[settings.policy](), max_blocks=1000)
            backends = Backends(settings, fleet)
            stack.push_async_callback(backends.client.aclose)
            await backends.start()
            app = RouterApp(settings, fleet, backends)
            assert app.proxy.prefill is not None
            own = app.proxy.prefill.backends
            stack.push_async_callback(own.client.aclose)
            await own.look(own.by_url[prefill.url])
            spoil()
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                headers = {"x-quire-prefilled": "1"}  # a client's word counts for nothing
                response = await client.post("/v1/completions", json=STREAM, headers=headers)
                assert (response.status_code, response.content) == (200, WHOLE)
                state: dict[str, Any] = (await client.get("/router")).json()
                return state

    return asyncio.run(asyncio.wait_for(run(), 20))


def test_a_long_prompt_is_computed_elsewhere_first() -> None:
    prefill, decode = FakeServer(), FakeServer(count_on)
    state = ask(prefill, decode)
    assert (prefill.num_prefilled, decode.num_prefilled, state["prefilled"]) == (1, 0, 1)
    assert decode.asked[0].headers["x-quire-prefilled"] == "1"
    assert [each["is_up"] for each in state["prefill"]] == [True]
    assert state["prefill"][0]["num_requests"] == 0


def test_a_short_prompt_is_not() -> None:
    prefill, decode = FakeServer(), FakeServer(count_on)
    assert ask(prefill, decode, prefill_min_tokens=41)["prefilled"] == 0
    assert "x-quire-prefilled" not in decode.asked[0].headers


@pytest.mark.parametrize("fault", ["dead", "hangs", "busy", "other model", "not Quire"])
def test_where_a_server_fails_the_other_one_computes(fault: str) -> None:
    prefill, decode = FakeServer(), FakeServer(count_on)

    def spoil() -> None:
        if fault == "dead":
            prefill.die()
        elif fault == "hangs":
            prefill.hangs = True
        elif fault == "busy":
            prefill.refusal = (429, b"{}")

    if fault == "other model":
        prefill.model = "another"
    elif fault == "not Quire":
        prefill.block_size = 0
    state = ask(prefill, decode, spoil, prefill_timeout=0.2)
    assert (prefill.num_prefilled, state["prefilled"]) == (0, 0)
    assert "x-quire-prefilled" not in decode.asked[0].headers
