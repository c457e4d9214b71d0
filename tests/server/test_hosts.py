"""The Host header: a page whose name was made to resolve to this machine (DNS rebinding) gets no answer."""

import pytest

from quire.errors import ConfigError
from quire.server.errors import Refusal
from quire.server.hosts import HostList
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

LOOPBACK = ["localhost", "LOCALHOST:8000", "localhost.", "app.localhost:1", "127.0.0.1", "127.8.8.8:9", "[::1]:8000"]
ADDRESSES = ["192.168.1.5:8000", "10.0.0.1", "[fe80::1]:80"]
FOREIGN = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "a@127.0.0.1"),
    *("evil-localhost", "[::1].evil.example", "x", "localhost:evil.example", "localhost:1:2", "0x7f000001"),
]
KEYED = {"api_key": ("k",)}


def allows(settings: ServerSettings, host: str) -> bool:
    try:
        HostList(settings).check([(b"host", host.encode())])
    except Refusal as error:
        return error.status != 403 or "--allowed-hosts" not in error.message
    return True


def test_loopback_names_addresses_and_the_bound_host_are_allowed() -> None:
    settings = ServerSettings(host="llm.example", allow_unauthenticated=True)
    assert all(allows(settings, host) for host in [*LOOPBACK, *ADDRESSES, "llm.example:8000", "LLM.example."])
    assert not any(allows(settings, host) for host in FOREIGN)
    HostList(settings).check([])
    assert allows(settings, "")


def test_every_host_header_counts() -> None:
    with pytest.raises(Refusal):
        HostList(ServerSettings()).check([(b"host", b"evil.example"), (b"host", b"localhost")])


def test_the_list_adds_names() -> None:
    settings = ServerSettings(allowed_hosts=("good.example", "Other.Example:80"))
    assert all(allows(settings, host) for host in ("good.example", "GOOD.example:8000", "other.example", "localhost"))
    assert not any(allows(settings, host) for host in [*FOREIGN, "a.good.example"])
    assert all(allows(ServerSettings(allowed_hosts=("*",)), host) for host in FOREIGN)


def test_with_keys_only_a_list_is_checked() -> None:
    assert allows(ServerSettings(**KEYED), "behind-a-proxy.example")
    settings = ServerSettings(**KEYED, allowed_hosts=("good.example",))
    assert allows(settings, "good.example")
    assert not allows(settings, "evil.example")


@pytest.mark.parametrize("host", ["http://good.example", "good.example/", "a b", "", "*.good.example"])
def test_a_wrong_list_is_refused_at_start(host: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts holds"):
        HostList(ServerSettings(allowed_hosts=(host,)))


def test_the_server_refuses_all_but_public_routes(engine: ScriptedEngine) -> None:
    with RunningServer(engine) as server:
        headers = {"host": "evil.example"}
        for method, path, body in (
            ("GET", "/v1/models", None),
            ("POST", "/v1/completions", {"prompt": "x"}),
            ("POST", "/api/chat", {}),
            ("GET", "/no-such-route", None),
        ):
            response, answer = server.send(method, path, body, headers)
            assert response.status == 403, path
            assert "evil.example" in str(answer)
        assert server.send("GET", "/health", headers=headers)[0].status == 200
        assert server.send("GET", "/v1/models", headers={"host": "localhost"})[0].status == 200
    assert not engine.calls
