"""Servers that come, go, restart their engine, or answer what no server should."""

import asyncio
import shutil
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from quire.errors import ConfigError
from quire.request import SampleProgress
from quire.router.app import RouterApp
from quire.router.backend import Backend
from quire.router.backends import Backends
from quire.router.backends_file import BackendsFile
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES
from tests.router.fake_server import Asked, Died, FakeServer, event, marked
from tests.router.test_proxy import DONE, STREAM, WHOLE, count_after, count_on, route, text_of
from tests.server.test_tls import certificate

JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
GARBAGE = {
    "no HTTP": b"220 mail.example.com ESMTP\r\n\r\n",
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-ty",
    "a wrong length": JSON_HEAD + b"content-length: x\r\n\r\n{}",
    "less than its length": JSON_HEAD + b"content-length: 500\r\n\r\n{}",
    "a wrong chunk": JSON_HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "no gzip": JSON_HEAD + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}",
    "no JSON": JSON_HEAD + b"content-length: 6\r\n\r\n<html>",
    "no UTF-8": JSON_HEAD + b'content-length: 12\r\n\r\n{"data":"\xff"}',
    "deep JSON": JSON_HEAD + b"content-length: 20000\r\n\r\n" + b"[" * 20_000,
    "another shape": JSON_HEAD + b'content-length: 18\r\n\r\n{"data": {"a": 1}}',
    "an endless header": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000,
    "a redirect": b"HTTP/1.1 302 X\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n",
    "too much": JSON_HEAD + b"content-length: 3000000\r\n\r\n" + b" " * 3_000_000,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_makes_a_server_unusable_and_harms_no_other(kind: str) -> None:
    """Whatever a server says of itself, the router names it and answers with the others."""
    bad = [FakeServer(count_on, raw={path: GARBAGE[kind]}) for path in ("/v1/models", "/health/ready")]
    good = FakeServer(count_on)

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        for _ in range(3):
            await asyncio.gather(*map(backends.look, backends.by_url.values()))
        state = (await client.get("/router")).json()["replicas"]
        assert (state[0]["is_up"], state[2]["is_up"]) == (False, True)
        assert state[0]["reason"]
        for _ in range(2):
            assert (await client.post("/v1/completions", json=STREAM)).content == WHOLE

    route([*bad, good], test)


@pytest.mark.parametrize("kind", ["no HTTP", "nothing", "half a head", "a wrong length", "less than its length"])
def test_a_garbled_answer_is_asked_for_elsewhere(kind: str) -> None:
    servers = [FakeServer(count_on), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        servers[0].raw["/v1/completions"] = GARBAGE[kind]
        for stream in (True, False):
            for _ in range(2):
                answer = await client.post("/v1/completions", json={**STREAM, "stream": stream})
                assert answer.content.startswith(event("t0"))
                assert answer.content.endswith(event("t9") + DONE)

    route(servers, test, policy="round-robin")


def test_a_server_that_drips_delays_no_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.router.probe.PROBE_SECONDS", 0.4)
    servers = [FakeServer(count_on), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        watching = asyncio.create_task(backends.watch())
        servers[0].drips = True
        servers[1].ready = 503
        while any(backend.is_up for backend in backends.by_url.values()):
            await asyncio.sleep(0.02)
        servers[0].drips, servers[1].ready = False, 200
        while not all(backend.is_up for backend in backends.by_url.values()):
            await asyncio.sleep(0.02)
        watching.cancel()

    route(servers, test, health_interval=0.05)


@pytest.mark.parametrize("status", ["restarting", "down", "stalled", "draining"])
@pytest.mark.parametrize("has_token", [True, False])
def test_streams_leave_an_engine_that_is_away(status: str, has_token: bool) -> None:
    """One with tokens of this engine goes on elsewhere. One without may be what the engine died of: it stays."""
    back = asyncio.Event()

    async def pauses(asked: Asked) -> AsyncIterator[bytes]:
        if has_token:
            yield marked("t0", 0)
        await back.wait()
        for token in range(has_token, 10):
            yield marked(f"t{token}", token) if token < 9 else event("t9") + DONE

    servers = [FakeServer(pauses), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        first, second = (backends.by_url[server.url] for server in servers)
        servers[1].ready = 503
        await backends.look(second)
        sending = asyncio.create_task(client.post("/v1/completions", json=STREAM))
        while not servers[0].asked or (has_token and not any(read.may_leave() for read in first._reads)):
            await asyncio.sleep(0.001)
        servers[0].ready, servers[0].status = 503, status
        await backends.look(first)
        assert not sending.done(), "there is no other server"
        servers[1].ready = 200
        await backends.look(second)
        await backends.look(first)
        await backends.look(first)  # a second time, before the stream has left
        moves = has_token and status != "draining"
        if not moves:
            back.set()
        assert (await sending).content == WHOLE
        assert len(servers[1].asked) == moves
        if moves:
            assert servers[1].asked[0].progress == {0: SampleProgress([0])}
        assert app.proxy.counts.cut_streams == 0

    route(servers, test)


def test_deaths_with_tokens_between_condemn_no_request() -> None:
    """A long stream may see more servers die than a deadly request does."""

    async def dies_after_a_token(asked: Asked) -> AsyncIterator[bytes]:
        done = len(asked.progress.get(0, SampleProgress([])).token_ids)
        yield marked(f"t{done}", done) if done < 9 else event("t9") + DONE
        if done < 9:
            await asyncio.sleep(0.02)
            raise Died

    servers = [FakeServer(dies_after_a_token) for _ in range(3)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        assert (await client.post("/v1/completions", json=STREAM)).content == WHOLE
        assert app.proxy.counts.resumed_streams == 9

    route(servers, test)


def test_a_server_dies_for_many_requests_at_once() -> None:
    """Each of them finds out, and ends the reads of the others."""

    async def test() -> None:
        async with httpx.AsyncClient() as client:
            backend = Backend("http://a", client)

            async def read() -> None:
                with backend._reading() as reading:
                    async with reading.limit:
                        await asyncio.sleep(60)

            reads = [asyncio.create_task(read()) for _ in range(3)]
            await asyncio.sleep(0)
            for _ in range(6):
                backend.fail("gone")
                await asyncio.sleep(0)
            results = await asyncio.gather(*reads, return_exceptions=True)
            assert [type(each) for each in results] == [TimeoutError] * 3
            assert not backend.is_busy

    asyncio.run(test())


def test_a_server_lost_during_a_look_is_looked_at_again() -> None:
    servers = [FakeServer(count_on), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        backend = backends.by_url[servers[0].url]
        looking = asyncio.create_task(backends.look(backend))
        for _ in range(3):  # it waits for an answer
            await asyncio.sleep(0)
        backends.lose(backend, "a request met it dead")
        await looking
        assert not backend.is_up
        await backends.look(backend)
        assert backend.is_up

    route(servers, test)


def test_a_stream_waits_longer_for_a_server_than_a_new_request() -> None:
    servers = [FakeServer(text_of(marked("t0", 0), die=True))]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        backend = backends.by_url[servers[0].url]
        sending = asyncio.create_task(client.post("/v1/completions", json=STREAM))
        while not servers[0].asked:
            await asyncio.sleep(0.001)
        servers[0].ready = 503
        await backends.look(backend)
        began = time.monotonic()
        refused = await client.post("/v1/completions", json=STREAM)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert time.monotonic() - began >= 0.3
        assert not sending.done()
        servers[0].ready, servers[0].script = 200, count_on
        await backends.look(backend)
        assert (await sending).content == WHOLE

    route(servers, test, server_timeout=0.4)


def test_servers_come_and_go_with_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that goes finishes its stream; a file that cannot be read changes nothing."""
    gate = asyncio.Event()

    servers = [FakeServer(count_after(gate)), FakeServer(count_on)]
    path = tmp_path / "servers"

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        listed = BackendsFile(path)

        async def change(text: str) -> None:
            path.write_text(text)
            listed.apply(backends)
            await asyncio.gather(*map(backends.look, list(backends.by_url.values())))

        await change(servers[0].url)
        assert list(app._fleet.replicas) == [servers[0].url]
        sending = asyncio.create_task(client.post("/v1/completions", json=STREAM))
        while not servers[0].asked:
            await asyncio.sleep(0.001)
        await change(f"# new\n\n{servers[1].url}/\n")
        assert list(app._fleet.replicas) == [servers[1].url]
        assert servers[0].url in backends.by_url, "it still has a stream"
        assert (await client.post("/v1/completions", json=STREAM)).content == WHOLE
        for text in ("", "host:1", f"{servers[0].url}\n{servers[0].url}"):
            await change(text)
            assert list(app._fleet.replicas) == [servers[1].url]
            assert "the servers stay as they are" in caplog.records[-1].message
        gate.set()
        assert (await sending).content == WHOLE
        await change(servers[1].url)
        assert list(backends.by_url) == [servers[1].url]

    route(servers, test)


def test_what_comes_later_must_fit_what_runs() -> None:
    """The first of the list comes back with another model: the ones that run stay."""
    servers = [FakeServer(count_on), FakeServer(count_on)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        first, second = (backends.by_url[server.url] for server in servers)
        for change in ({"model": "other"}, {"block_size": 64}):
            backends._set_down(first, "killed")
            servers[0].model, servers[0].block_size = "fake", 16
            for name, value in change.items():
                setattr(servers[0], name, value)
            await asyncio.gather(backends.look(first), backends.look(second))
            assert (first.is_up, second.is_up) == (False, True)
            assert first.reason.startswith(first.url)

    route(servers, test)


def test_servers_behind_a_prefix_and_without_health() -> None:
    no_health = {"/health": b"HTTP/1.1 404 X\r\ncontent-length: 0\r\n\r\n"}
    servers = [FakeServer(count_on, prefix="/a/b"), FakeServer(count_on, block_size=0, raw=no_health)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        assert all(backend.is_up for backend in backends.by_url.values())
        for _ in range(2):
            await client.post("/v1/completions", json=STREAM)
        assert [each.asked[0].path for each in servers] == ["/v1/completions"] * 2

    route(servers, test, policy="round-robin")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, which makes certificates")
def test_servers_with_tls(tmp_path: Path) -> None:
    """A certificate that nobody vouches for is the reason that is given; with its file the server is used."""
    made, key = certificate(tmp_path, "server")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made, key)

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        assert (await client.post("/v1/completions", json=STREAM)).content == WHOLE

    route([FakeServer(count_on, tls=tls)], test, backend_ca_file=Path(made))
    with pytest.raises(ConfigError, match=r"https://.*CERTIFICATE_VERIFY_FAILED.*--backend-ca-file"):
        route([FakeServer(count_on, tls=tls)], test)


def test_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no certificate")
    for path in (tmp_path / "ca", tmp_path / "none"):
        settings = RouterSettings(backends="https://a", backend_ca_file=path)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"backend_ca_file is .*; give a file in PEM format"):
            Backends(settings, Fleet(POLICIES["least-work"](), max_blocks=1))
