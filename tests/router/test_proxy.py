"""The router in front of scripted servers: who is asked, what the client gets, and what happens when servers die."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from quire.errors import ConfigError
from quire.request import SampleProgress
from quire.router.app import RouterApp
from quire.router.backends import Backends
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES
from tests.router.fake_server import Asked, Died, FakeServer, event, marked

DONE = b"data: [DONE]\n\n"
STREAM = {"model": "fake", "prompt": "a" * 100, "stream": True}

Test = Callable[[httpx.AsyncClient, RouterApp, Backends], Awaitable[None]]


def route(servers: list[FakeServer], test: Test, **options: Any) -> None:
    """Run `test` with a client of a router in front of `servers`."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server.running())
            settings = RouterSettings(backends=tuple(server.url for server in servers), **options)
            fleet = Fleet(POLICIES[settings.policy](), max_blocks=1000, max_requests=settings.max_backend_requests)
            backends = Backends(settings, fleet)
            stack.push_async_callback(backends.client.aclose)
            await backends.start()
            app = RouterApp(settings, fleet, backends)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                await test(client, app, backends)

    asyncio.run(asyncio.wait_for(run(), 20))


def count_after(gate: asyncio.Event) -> Callable[[Asked], AsyncIterator[bytes]]:
    """A whole answer that stops after its first token until `gate` is set."""

    async def script(asked: Asked) -> AsyncIterator[bytes]:
        yield marked("t0", 0)
        await gate.wait()
        for token in range(1, 10):
            yield marked(f"t{token}", token) if token < 9 else event("t9") + DONE

    return script


def text_of(*parts: bytes, die: bool = False) -> Callable[[Asked], AsyncIterator[bytes]]:
    async def script(asked: Asked) -> AsyncIterator[bytes]:
        for part in parts:
            yield part
        if die:
            await asyncio.sleep(0.02)  # what was written has arrived
            raise Died

    return script


async def count_on(asked: Asked) -> AsyncIterator[bytes]:
    """Tokens 0 to 9, from where the progress ends."""
    done = asked.progress.get(0, SampleProgress([])).token_ids
    for token in range(len(done), 10):
        yield marked(f"t{token}", token) if token < 9 else event("t9") + DONE


def dies_after(num_tokens: int, *, tail: bytes = b"") -> Callable[[Asked], AsyncIterator[bytes]]:
    """`count_on` that dies after so many more tokens and the bytes of `tail`."""

    async def script(asked: Asked) -> AsyncIterator[bytes]:
        sent = 0
        async for part in count_on(asked):
            if sent == num_tokens:
                if tail:
                    yield tail
                await asyncio.sleep(0.02)
                raise Died
            yield part
            sent += 1

    return script


WHOLE = b"".join(event(f"t{token}") for token in range(10)) + DONE


@pytest.mark.parametrize(
    "tail", [b"", event("t3"), event("t3") + b": quire [[0,[3],nu", b"data: half of an ev", b": quire moved\n\n"]
)
def test_a_stream_goes_on_at_another_server(tail: bytes) -> None:
    """Wherever the first server stops, the client gets every event once."""
    servers = [FakeServer(dies_after(3, tail=tail)), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        servers[1].ready = 503
        await backends.look(backends.by_url[servers[1].url])  # the first answer begins at the first server
        sending = asyncio.create_task(client.post("/v1/completions", json=STREAM))
        while not servers[0].asked:
            await asyncio.sleep(0.001)
        servers[1].ready = 200
        await backends.look(backends.by_url[servers[1].url])
        response = await sending
        assert response.content == WHOLE
        assert servers[1].asked[0].progress == {0: SampleProgress([0, 1, 2])}
        first, second = servers[0].asked[0].headers, servers[1].asked[0].headers
        assert first["x-quire-stream"].split()[:2] == second["x-quire-stream"].split()[:2]
        assert (app.proxy.counts.resumed_streams, app.proxy.counts.cut_streams) == (1, 0)

    route(servers, test)


def test_a_stream_moves_again_and_again() -> None:
    servers = [FakeServer(dies_after(2)) for _ in range(3)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        response = await client.post("/v1/completions", json=STREAM)
        assert response.content == WHOLE

    route(servers, test, max_deaths=20)


def test_a_request_that_kills_servers_is_refused() -> None:
    servers = [FakeServer(text_of(die=True)) for _ in range(5)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        response = await client.post("/v1/completions", json={**STREAM, "stream": False})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "request_quarantined")
        num_asked = sum(len(server.asked) for server in servers)
        assert num_asked == 3
        again = await client.post("/v1/completions", json={**STREAM, "stream": False})
        assert again.status_code == 400
        assert "servers died" in again.json()["error"]["message"]
        assert sum(len(server.asked) for server in servers) == num_asked

    route(servers, test)


@pytest.mark.parametrize("refusal", [(503, b'{"a": 1}'), (502, b"{}"), (429, b'{"b": 2}')])
def test_a_refused_request_goes_to_another_server(refusal: tuple[int, bytes]) -> None:
    servers = [FakeServer(count_on, refusal=refusal), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        for _ in range(4):
            assert (await client.post("/v1/completions", json=STREAM)).content == WHOLE

    route(servers, test, policy="round-robin")


def test_when_all_are_busy_the_client_learns_it() -> None:
    servers = [FakeServer(count_on, refusal=(429, b'{"error": {"message": "queue"}}')) for _ in range(2)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        response = await client.post("/v1/completions", json=STREAM)
        assert (response.status_code, response.json()) == (429, {"error": {"message": "queue"}})
        assert [len(server.asked) for server in servers] == [1, 1]

    route(servers, test)


def test_a_servers_own_error_is_passed_on() -> None:
    servers = [FakeServer(count_on, refusal=(400, b'{"error": {"message": "bad"}}')), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        answers = {(await client.post("/v1/completions", json=STREAM)).status_code for _ in range(4)}
        assert answers == {400, 200}
        assert app.proxy.counts.moved == 0

    route(servers, test, policy="round-robin")


def test_what_changes_something_is_sent_once() -> None:
    """An upload whose server dies may have been kept."""
    servers = [FakeServer(text_of(die=True)), FakeServer(text_of(die=True))]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        response = await client.post("/v1/files", content=b"{}")
        assert response.status_code == 503
        assert sum(len(server.asked) for server in servers) == 1

    route(servers, test)


def test_other_servers_get_the_request_as_it_was_and_their_streams_pass_through() -> None:
    servers = [FakeServer(text_of(event("a"), event("b"), DONE), block_size=0)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        response = await client.post("/v1/completions", json=STREAM, headers={"x-quire-stream": "forged", "x-a": "1"})
        assert response.content == event("a") + event("b") + DONE
        asked = servers[0].asked[0]
        assert asked.body == STREAM
        assert asked.headers["x-a"] == "1"
        assert "x-quire-stream" not in asked.headers

    route(servers, test)


def test_a_cut_stream_of_another_server_ends_with_an_error() -> None:
    servers = [FakeServer(text_of(event("a"), die=True), block_size=0)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        response = await client.post("/v1/completions", json=STREAM)
        first, error, done, _ = response.content.split(b"\n\n")
        assert (first, done) == (b"data: a", b"data: [DONE]")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
        assert app.proxy.counts.cut_streams == 1

    route(servers, test)


def test_turns_of_a_conversation_follow_their_blocks() -> None:
    servers = [FakeServer(count_on, block_size=0) for _ in range(4)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        for turn in range(1, 6):
            for session in range(4):
                prompt = f"session {session} " * 100 * turn
                await client.post("/v1/completions", json={**STREAM, "prompt": prompt})
        for server in servers:
            assert len({asked.body["prompt"][:10] for asked in server.asked}) == 1
            assert len(server.asked) == 5

    route(servers, test)


def test_requests_wait_for_a_place_and_a_full_room_refuses() -> None:
    gate = asyncio.Event()

    async def waits(asked: Asked) -> AsyncIterator[bytes]:
        await gate.wait()
        async for part in count_on(asked):
            yield part

    servers = [FakeServer(waits)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        sending = [asyncio.create_task(client.post("/v1/completions", json=STREAM)) for _ in range(5)]
        while len(app.proxy.waiting) < 2 or not any(task.done() for task in sending):
            await asyncio.sleep(0.001)
        assert len(servers[0].asked) == 2
        gate.set()
        responses = [await task for task in sending]
        assert sorted(response.status_code for response in responses) == [200, 200, 200, 200, 429]
        assert all(response.headers["retry-after"] for response in responses if response.status_code == 429)

    route(servers, test, max_backend_requests=2, max_queue_size=2)


def test_what_servers_keep_is_asked_where_it_is() -> None:
    servers = [FakeServer(text_of(b"{}")) for _ in range(3)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        for path in ("/v1/files", "/v1/files/f1", "/v1/batches", "/v1/files/f1/content"):
            await client.request("POST", path, content=b"{}")
        assert [len(server.asked) for server in servers] == [4, 0, 0]
        for _ in range(6):
            await client.post("/v1/responses", json={"input": "a"})
        made = {
            f"resp_{asked.headers['x-quire-stream'].split()[0]}": server
            for server in servers
            for asked in server.asked
            if asked.path == "/v1/responses"
        }
        assert len(made) == 6
        assert len({server.url for server in made.values()}) == 3
        for response_id, server in made.items():
            await client.get(f"/v1/responses/{response_id}")
            assert server.asked[-1].path == f"/v1/responses/{response_id}"
            await client.post("/v1/responses", json={"input": "b", "previous_response_id": response_id})
            assert server.asked[-1].body["previous_response_id"] == response_id

    route(servers, test, policy="round-robin")


def test_streams_of_a_server_that_hangs_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut network closes no connection: the server is taken for dead when it answers no probe."""
    monkeypatch.setattr("quire.router.probe.PROBE_SECONDS", 0.3)

    async def hangs(asked: Asked) -> AsyncIterator[bytes]:
        yield marked("t0", 0)
        await asyncio.sleep(60)

    servers = [FakeServer(hangs), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        servers[1].ready = 503
        await backends.look(backends.by_url[servers[1].url])
        sending = asyncio.create_task(client.post("/v1/completions", json=STREAM))
        while not servers[0].asked:
            await asyncio.sleep(0.001)
        servers[0].hangs = True
        servers[1].ready = 200
        for _ in range(4):
            await asyncio.gather(*(backends.look(backend) for backend in backends.by_url.values()))
        assert (await sending).content == WHOLE

    route(servers, test)


def test_servers_that_do_not_fit_together_are_refused_at_start() -> None:
    async def nothing(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(ConfigError, match=r"serves other, but .* serves fake; one router serves one model"):
        route([FakeServer(), FakeServer(model="other")], nothing)
    with pytest.raises(ConfigError, match=r"blocks of 64 tokens, but .* of 16.*--block-size"):
        route([FakeServer(), FakeServer(block_size=64)], nothing)
    with pytest.raises(ConfigError, match=r"wants an API key .* --backend-api-key"):
        route([FakeServer(key="secret")], nothing)


def test_health_and_state_say_which_servers_take_requests() -> None:
    servers = [FakeServer(count_on), FakeServer(count_on, ready=503)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        assert (await client.get("/health")).json() == {"status": "ready", "servers": 1}
        state = (await client.get("/router")).json()["replicas"]
        assert [each["is_up"] for each in state] == [True, False]
        assert state[1]["reason"] == "its /health/ready says 503 (ready)"
        servers[0].die()
        await backends.look(backends.by_url[servers[0].url])
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200

    route(servers, test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "backends is empty"),
        ({"backends": "host:8000"}, "no URL of a server"),
        ({"backends": "ftp://host"}, "no URL of a server"),
        ({"backends": "http://host/a/v1"}, "leave out /v1"),
        ({"backends": "http://host:70000"}, "no URL of a server"),
        ({"backends": "http://[::1"}, "no URL of a server"),
        ({"backends": "http://"}, "no URL of a server"),
        ({"backends": "http://a b"}, "no URL of a server"),
        ({"backends": "http://a", "backends_file": "b"}, "both given"),
        ({"backends": "http://a", "server_timeout": -1}, "must be from 0 to"),
        ({"backends": "http://a,http://a/"}, "twice"),
        ({"backends": "http://a", "kv_events": "tcp://a:1,tcp://b:1"}, "2 addresses for 1 backends"),
        *(
            ({"backends": "http://a", "kv_events": address}, "tcp://host:5557")
            for address in (
                "a:1",
                "tcp://a",
                "tcp://a:x",
                "tcp://a:0",
                "tcp://a:65536",
                "tcp://:1",
                "tcp://[::1",
                "ipc://",
            )
        ),
        ({"backends": "http://a", "decode": "http://b"}, "decode and backends are both given"),
        ({"decode": "http://a", "prefill": "b:1"}, "prefill has 'b:1', which is no URL of a server"),
        ({"decode": "http://a", "prefill": "http://a"}, "prefill has http://a, which is also among those that answer"),
        ({"decode": "http://a", "prefill_min_tokens": 0}, "prefill_min_tokens is 0; it must be from 1"),
        ({"decode": "http://a", "prefill_timeout": 0.0}, "prefill_timeout is 0.0; it must be above 0"),
        ({"backends": "http://a", "policy": "best"}, "must be one of least-work"),
        ({"backends": "http://a", "max_blocks": 0}, "must be from 1"),
        ({"backends": "http://a", "health_interval": 0.0}, "must be from 0.05"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterSettings(**options)


def test_unreachable_backends_are_named() -> None:
    async def start() -> None:
        settings = RouterSettings(backends="http://127.0.0.1:9")
        backends = Backends(settings, Fleet(POLICIES["least-work"](), max_blocks=1))
        try:
            await backends.start()
        finally:
            await backends.client.aclose()

    with pytest.raises(ConfigError, match=r"no backend answers \(http://127.0.0.1:9: it does not answer"):
        asyncio.run(start())
