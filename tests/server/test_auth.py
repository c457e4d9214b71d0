"""API keys and origins. Only the raw path and the key decide whether a request is accepted."""

from pathlib import Path

import pytest
from openai import AuthenticationError

from quire.errors import ConfigError
from quire.server.api_keys import plain_keys
from quire.server.app import ENDPOINTS
from quire.server.auth import Authenticator
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

KEYS = ("first-key", "second-key")
PATHS = [(e.method, e.path.replace("{model:path}", "m")) for e in ENDPOINTS if not e.public]


def test_every_route_but_health_needs_a_key(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=KEYS)) as server:
        assert server.send("GET", "/health")[0].status == 200
        for method, path in [*PATHS, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/no-such-route")]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first-key"}):
                response, body = server.send(method, path, {} if method == "POST" else None, headers)
                assert response.status == 401, path
                assert "a valid API key is needed" in str(body["error"])
        for key in KEYS:
            assert server.send("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})[0].status == 200
        with pytest.raises(AuthenticationError):
            server.client("nope").models.list()
        server.client(KEYS[1]).models.list()


@pytest.mark.parametrize("host", ["a/?", "a/health?", "a/#", "localhost/health", "[::1"])
def test_host_header_does_not_matter(engine: ScriptedEngine, host: str) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=KEYS)) as server:
        for target in (
            "/v1/models",
            f"http://{host.split('/')[0]}/v1/models",
            "/v1/models?x=/health",
            "//health",
        ):
            answer = server.raw(f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), (target, answer[:100])


def test_salt_follows_the_key(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=KEYS)) as server:
        for key in (*KEYS, KEYS[0]):
            server.client(key).completions.create(model="scripted", prompt="x")
        server.client(KEYS[0]).completions.create(model="scripted", prompt="x", extra_body={"cache_salt": "s"})
    first, second, again, salted = (call.cache_salt for call in engine.calls)
    assert first == again != second
    assert first
    assert KEYS[0] not in first
    assert salted not in (first, "s")


def test_the_tenant_is_the_account_of_the_key_or_the_user_without_keys(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=KEYS, share_prefix_cache=True)) as server:
        for key in (*KEYS, KEYS[0]):
            server.client(key).completions.create(model="scripted", prompt="x", user="somebody else")
    first, second, again = (call.tenant for call in engine.calls)
    assert first == again != second
    assert KEYS[0] not in first
    engine.calls.clear()
    with RunningServer(engine, ServerSettings(port=0)) as server:
        client = server.client("any")
        client.completions.create(model="scripted", prompt="x", user="somebody")
        client.completions.create(model="scripted", prompt="x")
    assert [call.tenant for call in engine.calls] == ["somebody", ""]


def test_salt_can_be_shared() -> None:
    authenticator = Authenticator(ServerSettings(api_key=KEYS, share_prefix_cache=True))
    assert authenticator.check_key([(b"authorization", b"bearer first-key")]).salt == ""


def test_public_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(ConfigError, match="there is no API key"):
            ServerSettings(host=host)
        ServerSettings(host=host, api_key="k")  # type: ignore[arg-type]  # one key may come alone
        ServerSettings(host=host, allow_unauthenticated=True)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        ServerSettings(host=host)


def test_pages_of_other_sites_are_refused(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, allow_origins=("https://good.example",))) as server:
        for origin, status in (
            ("http://localhost:3000", 200),
            ("https://127.0.0.1", 200),
            ("http://[::1]:5173", 200),
            ("http://tauri.localhost", 200),
            ("app://obsidian.md", 200),
            ("vscode-webview://1a2b-3c", 200),
            ("vscode-file://vscode-app", 200),
            ("tauri://localhost", 200),
            ("capacitor://localhost", 200),
            ("http://0.0.0.0:3000", 200),
            ("capacitor://evil.example", 403),
            ("https://good.example", 200),
            ("https://evil.example", 403),
            ("http://localhost.evil.example", 403),
            ("http://127.0.0.1.evil.example", 403),
            ("http://localhost:1@evil.example", 403),
            ("vscode-x://a/b", 403),
        ):
            response, _ = server.send("GET", "/v1/models", headers={"origin": origin})
            assert response.status == status, origin
            assert response.headers["access-control-allow-origin"] == (origin if status == 200 else None), origin
        asked = {"origin": "https://good.example", "access-control-request-method": "POST"}
        response, _ = server.send("OPTIONS", "/v1/chat/completions", headers=asked)
        assert response.status == 200
        assert response.headers["access-control-allow-origin"] == "https://good.example"


def test_a_hidden_origin_may_send_only_what_a_browser_asks_about(server: RunningServer) -> None:
    """Any page can hide its origin. For JSON its browser sends a preflight first, and that is not granted."""
    body = {"prompt": "x", "max_tokens": 1}
    for kind, status in (("application/json", 200), ("text/plain", 403)):
        headers = {"origin": "null", "content-type": kind}
        assert server.send("POST", "/v1/completions", body, headers=headers)[0].status == status
    asked = {"origin": "null", "access-control-request-method": "POST"}
    response, _ = server.send("OPTIONS", "/v1/completions", headers=asked)
    assert response.status == 400
    assert response.headers["access-control-allow-origin"] is None


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team\nalpha\n\n  beta  \nalpha\n")
    settings = ServerSettings(api_key=("gamma",), api_key_file=str(file), host="0.0.0.0")
    assert settings.keys == plain_keys(("gamma", "alpha", "beta"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\n# none\n", "holds no key; write one key per line"),
        (b"\xff\xfe", "is not UTF-8 text; write one key per line"),
    ],
)
def test_a_key_file_without_keys_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"api_key_file {file} {message}"):
        ServerSettings(api_key_file=str(file))
