"""Flaws published for other servers, tried on this one. Each test names the flaw; all run without a model."""

import asyncio
import fcntl
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from quire.config import EngineConfig
from quire.engine.checkpoint import find_model
from quire.errors import CheckpointError, QuireError, RequestError
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.server.app import ENDPOINTS
from quire.server.media_fetch import MediaFetcher
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import BUNDLED, ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TEXT = {"prompt": "x", "max_tokens": 2}
ROUTES_THAT_CHANGE_THE_SERVER = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
"""They answer 403 unless --allow-runtime-lora is set, and then take names and folders of the operator's machine."""


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine()) as running:
        yield running


@pytest.fixture
def evil_folder(tmp_path: Path) -> Path:
    """The bundled model's config, for a test to add hostile files to."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((BUNDLED / "config.json").read_bytes())
    return folder


def refusal_of(server: RunningServer, path: str, body: Any) -> str:
    """The message of a 4xx."""
    response, reply = server.send("POST", path, body)
    assert 400 <= response.status < 500, (response.status, reply)
    return str(reply["error"])


# -- code and checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_07_pickled_weights_are_refused_unread(name: str, evil_folder: Path, tmp_path: Path) -> None:
    """CVE-2025-24357, CVE-2026-15976."""
    marker = tmp_path / "marker"
    (evil_folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(CheckpointError):
        open_checkpoint(evil_folder)
    assert not marker.exists()


def test_09_a_folder_cannot_bring_code(evil_folder: Path, tmp_path: Path) -> None:
    """CVE-2025-66448, CVE-2026-27893, CVE-2026-22807: `auto_map` names a module that is never imported."""
    marker = tmp_path / "marker"
    config = json.loads((evil_folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (evil_folder / "config.json").write_text(json.dumps(config))
    (evil_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    ModelConfig.from_folder(evil_folder)
    with pytest.raises(CheckpointError):
        open_checkpoint(evil_folder)
    assert not marker.exists()


def test_10_checks_do_not_vanish_with_optimisation() -> None:
    """CVE-2026-41523: a check written as an assert is gone under `python -O`."""
    program = (
        "from quire.sampling_params import SamplingParams\n"
        "from quire.errors import QuireError\n"
        "for options in ({'n': 0}, {'temperature': -1}, {'top_p': 2}, {'max_tokens': -1}, {'n': 10**9}):\n"
        "    try:\n        SamplingParams(**options)\n"
        "    except QuireError:\n        continue\n"
        "    raise SystemExit(f'{options} was let through')\n"
    )
    subprocess.run([sys.executable, "-O", "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("name", ["org/../../x", "org/name@../../x", "pypi:../x", "org/name:../x.gguf"])
def test_40_names_cannot_leave_the_store(name: str) -> None:
    """CVE-2024-37032, CVE-2024-45436, CVE-2026-103663."""
    with pytest.raises(QuireError):
        find_model(name)


# -- sockets and routes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame", [pickle.dumps({"a": 1}), b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00" * 64]
)
def test_03_foreign_frames_are_closed(frame: bytes, shared: RunningServer) -> None:
    """CVE-2026-3059, CVE-2026-14890, CVE-2025-66455: there is one wire format, and no decoder to fall back to."""
    answer = shared.raw(frame + b"\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert shared.send("GET", "/health")[0].status == 200


def test_04_handles_never_come_from_requests(shared: RunningServer) -> None:
    """CVE-2026-115912: fields that look like shared memory or serialised objects are no fields."""
    handle = {"shm_name": "psm_1", "pickled": "gASVIQAAAAAAAAA=", "__reduce__": ["os.system", "id"]}
    assert refusal_of(shared, "/v1/completions", {**TEXT, "prompt": handle})
    assert refusal_of(shared, "/v1/completions", {**TEXT, "stop": handle})
    assert refusal_of(
        shared, "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "shm", **handle}]}]}
    )


def test_05_and_30_no_route_administers(shared: RunningServer) -> None:
    """CVE-2026-86793, CVE-2026-15969, CVE-2026-105754, PYSEC-2026-4353: no route takes code, tensors or hashes."""
    for path in (
        "/collective_rpc",
        "/sleep",
        "/wake_up",
        "/start_profile",
        "/update_weights",
        "/pause",
        "/reset_prefix_cache",
    ):
        assert shared.send("POST", path, {})[0].status == 404
    for path in ("/kv/load", "/kv/store", "/kv_transfer", "/disagg/prefill", "/flush_cache", "/server_info"):
        assert shared.send("POST", path, {})[0].status in (404, 405)
    routes = {endpoint.path for endpoint in ENDPOINTS}
    assert not {path for path in routes if re.search(r"admin|rpc|weights|profile|exec|debug", path)}
    for path in ROUTES_THAT_CHANGE_THE_SERVER:
        assert shared.send("POST", path, {"lora_name": "x", "lora_path": "/etc"})[0].status in (400, 403, 404)


def test_06_a_peer_that_does_not_read_slows_nobody() -> None:
    """CVE-2025-30202: clients whose receive windows are full, which is checked, hold up no other stream."""
    with RunningServer(ScriptedEngine(endless=True, max_model_len=2**20)) as server, ExitStack() as stalled:
        body = json.dumps({"prompt": "x", "max_tokens": 10**6, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost:\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        peers = []
        for _ in range(4):
            peer = stalled.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            peer.connect(("127.0.0.1", server.port))
            peer.sendall(head % len(body) + body)
            peers.append(peer)
        deadline = time.monotonic() + 20
        while any(unread(peer) < 2048 for peer in peers):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        response, reply = server.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 30})
        assert response.status == 200, reply
        assert reply["usage"]["completion_tokens"] == 30


def unread(peer: socket.socket) -> int:
    """Bytes that have arrived and were not read."""
    return int.from_bytes(fcntl.ioctl(peer, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("line", [b"x-long: " + b"a" * (10 << 20), b"\r\n".join(b"x-%d: y" % i for i in range(5000))])
def test_33_headers_are_limited(line: bytes, shared: RunningServer) -> None:
    """CVE-2025-48956."""
    try:
        answer = shared.raw(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n" + line + b"\r\n\r\n")
    except (ConnectionError, TimeoutError):
        answer = b""
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert shared.send("GET", "/health")[0].status == 200


@pytest.mark.parametrize("host", ["x/?", "x/#", "x/health?", "a@b/health", "[::1]/health"])
def test_34_the_host_header_opens_no_route(host: str) -> None:
    """CVE-2026-48746, CVE-2026-48710, CVE-2026-49468."""
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=("secret",))) as server:
        for target in ("/v1/models", "/metrics", "/kv", "/openapi.json"):
            answer = server.raw(f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400", b"HTTP/1.1 403")), (target, answer[:80])


def test_35_keys_are_compared_as_digests() -> None:
    """CVE-2025-59425: every key is tried, and a prefix of a key is no key."""
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=("abcdef", "ghijkl"))) as server:
        for key in ("a", "abcde", "abcdefg", "ABCDEF", "abcdef ghijkl", ""):
            assert server.send("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})[0].status == 401
        for key in ("abcdef", "ghijkl"):
            assert server.send("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})[0].status == 200


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["prompt_embeds", "prompt_embedding", "tensors", "kv_transfer_params"])
def test_08_no_field_takes_tensors(field: str, shared: RunningServer) -> None:
    """CVE-2025-62164, CVE-2026-56340, CVE-2026-73557: refused, or told to be ignored; never decoded."""
    body = {"max_tokens": 2, field: "gASVIQAAAAAAAAA="}
    response, reply = shared.send("POST", "/v1/completions", body)
    assert response.status == 400, reply


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/render", "/tokenize"])
@pytest.mark.parametrize("given", ["chat_template", "chat_template_kwargs"])
@pytest.mark.parametrize(
    "template",
    ["RENDERED", "{{ lipsum.__globals__ }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}"],
)
def test_12_and_13_templates_of_requests_are_not_rendered(
    path: str, given: str, template: str, shared: RunningServer
) -> None:
    """CVE-2026-5760, CVE-2025-61620, CVE-2026-115911, PYSEC-2026-4349, GHSA-69j4-grxj-j64p: one gate for all routes.
    The request is refused, or answered as if it brought no template."""
    plain = {"messages": CHAT["messages"]}
    value = template if given == "chat_template" else {"chat_template": template}
    seen = []
    for body in (plain, {**plain, given: value}):
        response, reply = shared.send("POST", path, body)
        assert response.status in (200, 400), reply
        seen.append((response.status, prompt_of(shared, path, reply)))
    assert seen[1] == seen[0] or seen[1][0] == 400


def prompt_of(server: RunningServer, path: str, reply: Any) -> Any:
    """The prompt that a request became."""
    if path == "/v1/chat/completions":
        engine = server.engine
        assert isinstance(engine, ScriptedEngine)
        return engine.calls[-1].prompt
    return reply.get("tokens", reply.get("prompt_token_ids", reply.get("prompt")))


@pytest.mark.parametrize("change", [{"n": 10**6}, {"best_of": 10**6}, {"n": -1}, {"max_tokens": -5}, {"top_k": 10**20}])
def test_14_numbers_have_a_range(change: dict[str, int], shared: RunningServer) -> None:
    """CVE-2026-34756, CVE-2024-8939."""
    assert next(iter(change)) in refusal_of(shared, "/v1/completions", {**TEXT, **change})


@pytest.mark.parametrize(
    "body", [{"prompt": ["x"] * 100_000}, {"prompt": [[5]] * 100_000}, {"prompt": ["x"] * 1000, "n": 128}]
)
def test_15_a_list_of_prompts_does_not_fan_out(body: dict[str, Any], shared: RunningServer) -> None:
    """PYSEC-2026-3704: refused before the engine gets any of it."""
    engine = shared.engine
    assert isinstance(engine, ScriptedEngine)
    num_calls = len(engine.calls)
    assert refusal_of(shared, "/v1/completions", {**body, "max_tokens": 1})
    assert len(engine.calls) == num_calls


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/a.png",
        "http://[::1]:{port}/a.png",
        "http://127.1:{port}/a.png",
        "http://2130706433:{port}/a",
        "file:///etc/passwd",
        "ftp://127.0.0.1:{port}/a",
    ],
)
def test_21_the_server_fetches_nothing_by_itself(url: str, shared: RunningServer) -> None:
    """CVE-2025-6242, CVE-2026-24779, CVE-2026-25960, CVE-2026-34753."""
    asked = []

    class Canary(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    canary = HTTPServer(("127.0.0.1", 0), Canary)
    threading.Thread(target=canary.serve_forever, daemon=True).start()
    part = {"type": "image_url", "image_url": {"url": url.format(port=canary.server_port)}}
    refusal_of(shared, "/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]})
    # Nor does a list of allowed domains lead to an address of this machine, however it is written.
    given, host = url.format(port=canary.server_port), urlsplit(url.format(port=1)).hostname or ""
    with pytest.raises(RequestError, match=r"address is not public|neither a data URL|not of an allowed domain"):
        asyncio.run(MediaFetcher([host], 4000).fetch(given))
    assert asked == []
    with pytest.raises(RequestError, match="status 404"):  # the canary hears a fetcher without that check
        asyncio.run(
            MediaFetcher(["127.0.0.1"], 4000, is_public=lambda address: True).fetch(
                f"http://127.0.0.1:{canary.server_port}/heard"
            )
        )
    canary.shutdown()
    canary.server_close()
    assert asked == ["/heard"]


def test_23_errors_hold_no_addresses_and_no_paths(shared: RunningServer) -> None:
    """CVE-2026-22778."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
        ("/v1/completions", {**TEXT, "guided_json": "{", "n": "x"}),
        ("/v1/completions", b"\xff\xfe{"),
        (
            "/v1/chat/completions",
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        ),
        ("/v1/completions", {**TEXT, "model": "../../etc/passwd"}),
    ]
    for path, body in bodies:
        said = refusal_of(shared, path, body)
        assert not re.search(r"0x[0-9a-f]{6,}|/home/|/usr/|site-packages|Traceback", said), said


def test_24_and_26_tenants_never_share() -> None:
    """CVE-2025-46570, CVE-2026-105755: salts follow the key, and a client's request id is only echoed."""
    engine = ScriptedEngine()
    with RunningServer(engine, ServerSettings(port=0, api_key=("one", "two"))) as server:
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}", "x-request-id": "same"}
            response, _ = server.send("POST", "/v1/completions", {**TEXT, "cache_salt": "same"}, headers)
            assert response.headers["x-request-id"] == "same"
    salts = [call.cache_salt for call in engine.calls]
    assert salts[0] != salts[1]


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}])
def test_18_and_20_schemas_fail_alone(schema: dict[str, Any], shared: RunningServer) -> None:
    """CVE-2026-105757, CVE-2025-48942, CVE-2025-48943, CVE-2025-48944, CVE-2025-57809, CVE-2026-25048."""
    body = {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    assert shared.send("POST", "/v1/chat/completions", body)[0].status in (200, 400)
    text = json.dumps({**CHAT, "tools": []})[:-1] + ', "response_format": ' + nested(3000) + "}"
    assert shared.send("POST", "/v1/chat/completions", text.encode())[0].status == 400
    assert shared.send("GET", "/health")[0].status == 200


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def test_41_sizes_of_configs_have_limits(evil_folder: Path) -> None:
    """CVE-2026-7482, CVE-2024-12055."""
    config = json.loads((evil_folder / "config.json").read_text())
    for change in (
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**13},
        {"vocab_size": -1},
        {"num_attention_heads": 0},
    ):
        (evil_folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=next(iter(change))):
            ModelConfig.from_folder(evil_folder)


def test_39_a_public_address_needs_a_key() -> None:
    """CVE-2026-34159, CVE-2026-118375: nothing listens for others without authentication unless it is asked for."""
    with pytest.raises(QuireError, match="no API key"):
        ServerSettings(host="0.0.0.0")
    assert EngineConfig().kv_events_config is None
