"""Faults of the stores: a table of faults, each of them a 503 with a cause and a way out in every route of a store."""

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.server.batches.objects import FileObject
from quire.server.batches.store import BatchStore
from quire.server.responses.store import ResponseStore
from quire.server.settings import ServerSettings
from quire.server.store_faults import StoreFailedError, store_faults
from tests.server.batches.test_batches import answers, request_line, submit, wait_for
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine


def sqlite_error(kind: type[sqlite3.Error], text: str, code: int) -> sqlite3.Error:
    error = kind(text)
    error.sqlite_errorcode = code
    return error


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/secret/path")


FAULTS: dict[str, tuple[Exception, str]] = {
    "sqlite full": (
        sqlite_error(sqlite3.OperationalError, "database or disk is full", sqlite3.SQLITE_FULL),
        "free space",
    ),
    "sqlite locked": (
        sqlite_error(sqlite3.OperationalError, "database is locked", sqlite3.SQLITE_BUSY),
        "another process",
    ),
    "sqlite read-only": (
        sqlite_error(sqlite3.OperationalError, "attempt to write a readonly database", sqlite3.SQLITE_READONLY),
        "cannot be written",
    ),
    "sqlite moved": (
        sqlite_error(sqlite3.OperationalError, "readonly", sqlite3.SQLITE_READONLY_DBMOVED),
        "missing",
    ),
    "sqlite damaged": (
        sqlite_error(sqlite3.DatabaseError, "database disk image is malformed", sqlite3.SQLITE_CORRUPT),
        "damaged",
    ),
    "sqlite read fails": (sqlite_error(sqlite3.OperationalError, "disk I/O error", sqlite3.SQLITE_IOERR_READ), "log"),
    "without a code": (sqlite3.ProgrammingError("Cannot operate on a closed database."), "log"),
    "disk full": (os_error(errno.ENOSPC), "free space"),
    "quota": (os_error(errno.EDQUOT), "free space"),
    "read-only disk": (os_error(errno.EROFS), "cannot be written"),
    "no right": (os_error(errno.EACCES), "cannot be written"),
    "folder gone": (os_error(errno.ENOENT), "missing"),
    "disk broken": (os_error(errno.EIO), "log"),
    "row damaged": (msgspec.ValidationError("Object missing required field `id`"), "damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_store_cause_and_way_out(name: str) -> None:
    fault, way_out = FAULTS[name]
    with pytest.raises(StoreFailedError) as raised, store_faults("--some-store"):
        raise fault
    error = raised.value
    assert (error.status, error.code) == (503, "store_failed")
    assert "--some-store" in error.message
    assert way_out in error.message
    assert "secret" not in error.message  # paths are for the log
    assert dict(error.headers)[b"retry-after"].isdigit()


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), store_faults("--some-store"):
        raise KeyError("a mistake of the program")


# -- every route ------------------------------------------------------------------------------------------------------


class Switch:
    """Lets every call of a store raise `fault`, while there is one."""

    fault: Exception | None = None

    def wrap(self, monkeypatch: pytest.MonkeyPatch, owner: type, names: tuple[str, ...]) -> None:
        for name in names:
            monkeypatch.setattr(owner, name, self._guarded(getattr(owner, name)))

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            if self.fault is not None:
                raise self.fault
            return call(*args, **options)

        return guarded


STORE_CALLS = (
    *("add_file", "file", "files", "total_bytes", "delete_file", "add_batch", "save", "batch", "batches"),
    *("add_answers", "answered_lines", "write_answers", "end", "unended"),
)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    switch = Switch()
    switch.wrap(monkeypatch, BatchStore, STORE_CALLS)
    switch.wrap(monkeypatch, ResponseStore, ("_save", "_load", "_history", "_delete"))
    return switch


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.store_faults._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("quire.server.store_faults._LONGEST_PAUSE", 0.05)


@pytest.fixture
def server(engine: ScriptedEngine, switch: Switch, tmp_path: Path) -> Iterator[RunningServer]:
    settings = ServerSettings(port=0, batch_dir=str(tmp_path / "b"), responses_store=str(tmp_path / "r.sqlite3"))
    with RunningServer(engine, settings) as running:
        yield running


def multipart(content: bytes) -> tuple[bytes, dict[str, str]]:
    head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content + b"\r\n--b--\r\n"
    return head + file, {"content-type": "multipart/form-data; boundary=b"}


def test_every_route_of_a_store_answers_503(server: RunningServer, switch: Switch, short_pauses: None) -> None:
    with server.client() as client:
        file = client.files.create(file=("input.jsonl", b"{}"), purpose="batch").id
        batch = submit(client, [request_line("a")]).id
        wait_for(client, batch)
        response = client.responses.create(model="scripted", input="x", max_output_tokens=20).id
    upload, form = multipart(b"{}")
    routes: list[tuple[str, str, Any, dict[str, str]]] = [
        ("POST", "/v1/files", upload, form),
        ("GET", "/v1/files", None, {}),
        ("GET", f"/v1/files/{file}", None, {}),
        ("GET", f"/v1/files/{file}/content", None, {}),
        ("DELETE", f"/v1/files/{file}", None, {}),
        (
            "POST",
            "/v1/batches",
            {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"},
            {},
        ),
        ("GET", "/v1/batches", None, {}),
        ("GET", f"/v1/batches/{batch}", None, {}),
        ("POST", f"/v1/batches/{batch}/cancel", None, {}),
        ("GET", f"/v1/responses/{response}", None, {}),
        ("GET", f"/v1/responses/{response}/input_items", None, {}),
        ("POST", f"/v1/responses/{response}/cancel", None, {}),
        ("DELETE", f"/v1/responses/{response}", None, {}),
        ("POST", "/v1/responses", {"input": "x", "previous_response_id": response, "max_output_tokens": 20}, {}),
        ("POST", "/v1/responses", {"input": "x", "background": True, "max_output_tokens": 20}, {}),
        ("POST", "/v1/responses", {"input": "x", "background": True, "stream": True, "max_output_tokens": 20}, {}),
    ]
    for name in ("sqlite full", "disk full", "folder gone"):
        switch.fault, way_out = FAULTS[name]
        for method, path, body, headers in routes:
            reply, content = server.send(method, path, body, headers)
            error = content["error"]
            case = (name, method, path, content)
            assert reply.status == 503, case
            assert reply.headers["retry-after"], case
            assert (error["type"], error["code"]) == ("service_unavailable_error", "store_failed"), case
            assert way_out in error["message"], case
        # An answer needs no store: the client gets it, and a warning.
        reply, content = server.send("POST", "/v1/responses", {"input": "x", "max_output_tokens": 20})
        assert (reply.status, content["status"]) == (200, "completed"), name
        assert "is not kept" in reply.headers["x-quire-warning"], name
    switch.fault = None
    for method, path, body, headers in sorted(routes, key=lambda route: route[0] == "DELETE"):
        reply, content = server.send(method, path, body, headers)
        assert reply.status in (200, 400, 409), (method, path, content)  # what was stored is still there


# -- batches go on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sqlite full", "folder gone"])
def test_a_batch_goes_on_by_itself(
    name: str, server: RunningServer, switch: Switch, short_pauses: None, engine: ScriptedEngine
) -> None:
    """Faults come while the input is checked, while lines are answered and while the files are written."""
    ids = [f"r{index}" for index in range(80)]
    engine.delay = 0.001
    with server.client() as client:
        batch = submit(client, [request_line(custom_id) for custom_id in ids])
        for _ in range(4):
            switch.fault = FAULTS[name][0]
            time.sleep(0.05)
            switch.fault = None
            time.sleep(0.03)
        batch = wait_for(client, batch.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 80)
        assert [line["custom_id"] for line in answers(client, batch.output_file_id)] == ids


@pytest.mark.parametrize("call", ["save", "answered_lines", "add_answers", "write_answers", "add_file", "end"])
def test_a_fault_of_each_step_is_tried_again(
    call: str,
    engine: ScriptedEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_pauses: None,
) -> None:
    faults = iter([FAULTS["disk full"][0], RuntimeError("a mistake of the program")])
    true_call = getattr(BatchStore, call)
    armed = False

    def failing(*args: Any, **options: Any) -> Any:
        if armed and (fault := next(faults, None)):
            raise fault
        return true_call(*args, **options)

    monkeypatch.setattr(BatchStore, call, failing)
    with RunningServer(engine, ServerSettings(port=0, batch_dir=str(tmp_path))) as server, server.client() as client:
        file = client.files.create(
            file=("i", b"\n".join(msgspec.json.encode(request_line(f"r{i}")) for i in range(10))), purpose="batch"
        )
        armed = True
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        batch = wait_for(client, batch.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 10)
        assert len(answers(client, batch.output_file_id)) == 10
        assert next(faults, None) is None  # all of them came


@pytest.mark.parametrize("name", ["sqlite full", "read-only disk"])
def test_a_batch_is_cancelled_while_its_store_fails(
    name: str, server: RunningServer, switch: Switch, short_pauses: None, engine: ScriptedEngine
) -> None:
    engine.delay = 0.01
    with server.client() as client:
        batch = submit(client, [request_line(f"r{index}") for index in range(100)])
        wait_for(client, batch.id, "in_progress")
        true_batch = BatchStore.batch
        switch.fault = FAULTS[name][0]
        with pytest.MonkeyPatch.context() as patch:  # the disk can be read, and not be written
            patch.setattr(BatchStore, "batch", lambda self, *args: reading(switch, true_batch, self, *args))
            assert client.batches.cancel(batch.id).status == "cancelling"
            end = time.monotonic() + 10
            while engine.num_running:  # the engine is free although nothing could be saved
                assert time.monotonic() < end
                time.sleep(0.01)
            assert client.batches.retrieve(batch.id).status == "cancelling"
        switch.fault = None
        batch = wait_for(client, batch.id)
        assert batch.status == "cancelled"
        found = answers(client, batch.output_file_id) + answers(client, batch.error_file_id)
        assert sorted(line["custom_id"] for line in found) == sorted(f"r{index}" for index in range(100))


def reading(switch: Switch, call: Callable[..., Any], *args: Any) -> Any:
    fault, switch.fault = switch.fault, None
    try:
        return call(*args)
    finally:
        switch.fault = fault


def test_a_batch_whose_input_is_gone_ends(engine: ScriptedEngine, tmp_path: Path, short_pauses: None) -> None:
    engine.delay = 0.05
    with RunningServer(engine, ServerSettings(port=0, batch_dir=str(tmp_path))) as server, server.client() as client:
        running = submit(client, [request_line(f"r{index}") for index in range(300)])
        wait_for(client, running.id, "in_progress")
        file = client.files.create(file=("i", b"{}"), purpose="batch")
        for path in (tmp_path / "files").iterdir():
            path.unlink()
        with pytest.raises(Exception, match="missing"):
            client.files.content(file.id)
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        assert wait_for(client, batch.id).errors.data[0].code == "input_file_missing"
        client.batches.cancel(running.id)
        assert wait_for(client, running.id).status == "cancelled"


def test_a_deleted_folder_is_503_and_not_the_end(engine: ScriptedEngine, tmp_path: Path, short_pauses: None) -> None:
    folder = tmp_path / "b"
    with RunningServer(engine, ServerSettings(port=0, batch_dir=str(folder))) as server:
        with server.client() as client:
            submit(client, [request_line(f"r{index}") for index in range(50)])
        shutil.rmtree(folder)
        upload, form = multipart(b"{}")
        reply, content = server.send("POST", "/v1/files", upload, form)
        assert (reply.status, content["error"]["code"]) == (503, "store_failed")
        reply, _ = server.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})
        assert reply.status == 200


def test_a_fault_of_the_disk_at_the_start_is_waited_for(
    engine: ScriptedEngine, tmp_path: Path, switch: Switch, short_pauses: None
) -> None:
    settings = ServerSettings(port=0, batch_dir=str(tmp_path))
    engine.delay = 0.05
    with RunningServer(engine, settings) as server, server.client() as client:
        batch = submit(client, [request_line(f"r{index}") for index in range(5)])
        wait_for(client, batch.id, "in_progress")
    switch.fault = FAULTS["sqlite locked"][0]
    with RunningServer(ScriptedEngine(), settings) as server, server.client() as client:
        time.sleep(0.05)
        switch.fault = None
        assert wait_for(client, batch.id).request_counts.completed == 5


def test_a_full_disk_frees_content_before_the_row(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    content = tmp_path / "files" / "file-1"
    (tmp_path / "files" / "file-1.partial").write_bytes(b"{}")
    file = FileObject(id="file-1", bytes=2, created_at=0, filename="f", purpose="batch")
    store.add_file(file, "", content.with_name("file-1.partial"))
    store._db.execute("PRAGMA query_only = 1")
    with pytest.raises(sqlite3.OperationalError):
        store.delete_file("file-1", "")
    assert not content.exists()
    store._db.execute("PRAGMA query_only = 0")
    assert store.delete_file("file-1", "")
    assert not store.delete_file("file-1", "")
    store.close()


def test_content_without_a_row_is_removed_at_the_start(tmp_path: Path) -> None:
    BatchStore(tmp_path).close()
    for name in ("file-1", "file-2.partial", "note"):
        (tmp_path / "files" / name).touch()
    BatchStore(tmp_path).close()
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["note"]
