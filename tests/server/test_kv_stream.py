"""/kv/stream, /kv/blocks, /kv/requests: changes of the pool as events, and who may read prompts."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from quire import AsyncLLM, EngineConfig
from quire.engine.messages import WatchPool
from quire.engine.pool_views import MAX_VIEWERS
from quire.pool_view import BlockDetail, BlockHolder, PoolChange, PoolFrame, PoolShape, RequestDetail, RequestView
from quire.server.kv import encode_frame
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

KEYS = """
[[keys]]
name = "alice"
key = "a"
[[keys]]
name = "bob"
key = "b"
[[keys]]
name = "root"
key = "r"
admin = true
"""
TEXT = "What light through yonder window breaks"


class Viewer:
    """One connection to /kv/stream."""

    def __init__(self, server: RunningServer, headers: dict[str, str]) -> None:
        self.connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        self.connection.request("GET", "/kv/stream", headers=headers)
        self.response = self.connection.getresponse()

    def frame(self) -> dict[str, Any]:
        while True:
            line = self.response.fp.readline()
            if line.startswith(b"data: "):
                frame: dict[str, Any] = json.loads(line[6:])
                return frame

    def until(self, part: str) -> dict[str, Any]:
        """The first frame that has this part."""
        while part not in (frame := self.frame()):
            pass
        return frame


@contextmanager
def viewing(server: RunningServer, key: str = "") -> Iterator[Viewer]:
    viewer = Viewer(server, {"authorization": f"Bearer {key}"} if key else {})
    try:
        yield viewer
    finally:
        viewer.response.close()
        viewer.connection.close()


def row(slot: int, tenant: str) -> RequestView:
    return RequestView(slot, f"r{slot}", tenant, "decoding", 1, 3, 5, 4, 1, 1, 0, 0, {}, None)


def change(words: dict[int, int], requests: list[RequestView]) -> PoolChange:
    blocks = b"".join(block.to_bytes(4, "little") for block in words)
    packed = b"".join(word.to_bytes(8, "little") for word in words.values())
    return PoolChange(PoolShape(8, 16, (0,), 512), blocks, packed, requests, [], [])


def apply(server: RunningServer, engine: ScriptedEngine, given: PoolChange) -> None:
    server._loop.call_soon_threadsafe(engine.views.apply, given)


def test_frames_leave_out_what_is_empty() -> None:
    assert encode_frame(PoolFrame("ready")) == b'data: {"state":"ready"}\n\n'
    frame = PoolFrame("ready", blocks=[(0, 3, 1, 1, 16, 0, 0)], ended=[2])
    assert encode_frame(frame) == b'data: {"state":"ready","blocks":[[0,3,1,1,16,0,0]],"ended":[2]}\n\n'


def test_the_engine_records_from_the_first_viewer_to_the_last(server: RunningServer, engine: ScriptedEngine) -> None:
    with viewing(server) as first, viewing(server) as second:
        assert first.frame()["state"] == "ready"
        assert second.response.headers["content-type"].startswith("text/event-stream")
        apply(server, engine, change({0: 1 | 1 << 16 | 16 << 24, 1: 1 | 1 << 16 | 16 << 24}, [row(1, "")]))
        for viewer in (first, second):
            frame = viewer.until("shape")
            assert frame["shape"] == {"num_blocks": 8, "block_size": 16, "windows": [0], "max_step_tokens": 512}
            assert frame["blocks"] == [[0, 2, 1, 1, 16, 0, 0]]
            assert frame["requests"][0]["request_id"] == "r1"
        assert engine.sent == [WatchPool(on=True)]
    deadline = time.monotonic() + 10
    while len(engine.views) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.sent == [WatchPool(on=True), WatchPool(on=False)]


def test_a_viewer_too_many_is_refused(server: RunningServer, engine: ScriptedEngine) -> None:
    viewers = [Viewer(server, {}) for _ in range(MAX_VIEWERS)]
    response, body = server.send("GET", "/kv/stream")
    assert (response.status, body["error"]["code"]) == (429, "too_many_viewers")
    for viewer in viewers:
        viewer.response.close()
        viewer.connection.close()


@pytest.fixture
def keyed(engine: ScriptedEngine, tmp_path: Path) -> Iterator[RunningServer]:
    (tmp_path / "keys.toml").write_text(KEYS)
    settings = ServerSettings(port=0, api_keys=str(tmp_path / "keys.toml"))
    with RunningServer(engine, settings) as running:
        yield running


def account(server: RunningServer, name: str) -> str:
    return next(key.account for key in server.settings.keys if key.name == name)


def test_a_key_sees_its_own_and_an_admin_all(keyed: RunningServer, engine: ScriptedEngine) -> None:
    alice, bob = account(keyed, "alice"), account(keyed, "bob")
    with viewing(keyed, "a") as own, viewing(keyed, "r") as admin:
        own.frame(), admin.frame()
        apply(keyed, engine, change({0: 1 | 1 << 16, 1: 2 | 1 << 16, 2: 1 << 40}, [row(1, alice), row(2, bob)]))
        seen, everything = own.until("shape"), admin.until("shape")
    assert [each["tenant"] for each in seen["requests"]] == [alice]
    assert seen["blocks"] == [[0, 1, 1, 1, 0, 0, 0]]
    assert not {"stats", "latencies"} & set(seen)
    assert len(everything["requests"]) == 2
    assert len(everything["blocks"]) == 3
    assert everything["stats"]["num_blocks"] == 64
    assert keyed.send("GET", "/kv/stream")[0].status == 401


def block_detail(server: RunningServer) -> BlockDetail:
    holders = [BlockHolder("r1", account(server, "alice"), 0, 0), BlockHolder("r2", account(server, "bob"), 0, 0)]
    return BlockDetail(3, 2, 2, True, False, 0, 1.0, "ab", holders, [5, 6])


def test_details_are_for_the_holder_of_the_key(
    keyed: RunningServer, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def block(number: int) -> BlockDetail | None:
        return block_detail(keyed) if number == 3 else None

    async def request(request_id: str) -> RequestDetail | None:
        view = row(1, account(keyed, "alice"))
        return RequestDetail(view, [], {"r2": 1}, [5, -1], False) if request_id == "r1" else None

    monkeypatch.setattr(engine.questions, "block", block)
    monkeypatch.setattr(engine.questions, "request", request)
    for key, path, status in (
        *(
            ("a", "/kv/blocks/3", 200),
            ("b", "/kv/blocks/3", 200),
            ("r", "/kv/blocks/3", 200),
            ("x", "/kv/blocks/3", 401),
        ),
        *(("a", "/kv/requests/r1", 200), ("b", "/kv/requests/r1", 404), ("r", "/kv/requests/r1", 200)),
        *(("r", f"/kv/blocks/{name}", 404) for name in ("4", "-1", "x", "3.0", "9" * 30, "%20", "³")),
        *(("r", "/kv/requests/r9", 404), ("r", f"/kv/requests/{'x' * 500}", 404)),
    ):
        response, body = keyed.send("GET", path.replace("³", "%C2%B3"), headers={"authorization": f"Bearer {key}"})
        assert response.status == status, (key, path)
        if status == 404:
            assert "GET /kv" in body["error"]["message"]
    headers = {"authorization": "Bearer a"}
    assert [
        each["request_id"] for each in keyed.send("GET", "/kv/blocks/3", headers=headers)[1]["block"]["holders"]
    ] == ["r1"]
    shown = keyed.send("GET", "/kv/requests/r1", headers=headers)[1]
    assert shown["request"]["shared_with"] == {}
    assert shown["texts"][1] == ""


def test_without_keys_prompts_are_shown_to_this_machine_only(engine: ScriptedEngine) -> None:
    async def block(number: int) -> None:
        return None

    engine.questions.block = block  # type: ignore[method-assign,assignment]
    with RunningServer(engine) as server:
        assert server.send("GET", "/kv/blocks/0")[0].status == 404
        for header in ("x-forwarded-for", "forwarded", "via", "x-real-ip"):
            response, body = server.send("GET", "/kv/blocks/0", headers={header: "1.2.3.4"})
            assert response.status == 403, header
            assert "--api-key" in body["error"]["message"]
    open_to_all = ServerSettings(port=0, host="0.0.0.0", allow_unauthenticated=True)
    with RunningServer(ScriptedEngine(), open_to_all) as server:
        assert server.send("GET", "/kv/requests/r1")[0].status == 403


def test_a_real_engine_streams_forks_and_no_text() -> None:
    """n = 4: the prompt's blocks have four references; the stream holds no prompt, the details do."""
    config = EngineConfig.from_options({"num_blocks": 200, "threads": 1, "dtype": "float32", "spare": False})
    body = {"prompt": TEXT * 4, "n": 4, "max_tokens": 200, "ignore_eos": True, "stream": True, "temperature": 0}
    with RunningServer(AsyncLLM(config), start_seconds=90) as server, viewing(server) as viewer:
        viewer.until("shape")
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        connection.getresponse().read(1)
        frames = [viewer.until("requests")]
        while not any(run[3] == 4 for run in frames[-1].get("blocks", [])):
            frames.append(viewer.frame())
        shared = next(run[0] for run in frames[-1]["blocks"] if run[3] == 4)
        request_id = frames[0]["requests"][0]["request_id"]
        detail = server.send("GET", f"/kv/requests/{request_id}")[1]
        block = server.send("GET", f"/kv/blocks/{shared}")[1]
        connection.close()
    assert not any(word in json.dumps(frames) for word in ("light", "yonder", "token_ids", "texts"))
    assert "".join(detail["texts"]).removeprefix("<|begin|>").startswith(TEXT)
    assert len(detail["request"]["samples"]) == 4
    assert all(shared in sample["tables"][0] for sample in detail["request"]["samples"])
    assert len(block["block"]["holders"]) == 4
    assert len(block["texts"]) == 16
