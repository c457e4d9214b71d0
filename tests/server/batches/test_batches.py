"""Files and batches through OpenAI's client, on a scripted engine."""

import json
import sqlite3
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from quire.errors import ConfigError, QueueFullError
from quire.server.batches.store import BatchStore
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine

URL = "/v1/chat/completions"


def request_line(custom_id: str, **body: Any) -> dict[str, Any]:
    chat = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **body}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": chat}


def settings_for(folder: Path, **options: Any) -> ServerSettings:
    return ServerSettings(port=0, batch_dir=str(folder), **options)


@pytest.fixture
def server(engine: ScriptedEngine, tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(engine, settings_for(tmp_path)) as running:
        yield running


def submit(client: OpenAI, lines: list[Any], **options: Any) -> Any:
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    assert file.bytes == len(content)
    fields: dict[str, Any] = {"endpoint": URL, "completion_window": "24h", **options}
    return client.batches.create(input_file_id=file.id, **fields)


def wait_for(client: OpenAI, batch_id: str, *statuses: str, seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in (statuses or ("completed", "failed", "expired", "cancelled")):
            return batch
        assert time.monotonic() < end, batch
        time.sleep(0.02)


def answers(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_every_line_is_answered_in_order(client: OpenAI, engine: ScriptedEngine) -> None:
    lines = [request_line(f"r{index}", max_tokens=50) for index in range(150)]
    batch = submit(client, lines, metadata={"job": "nightly"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"job": "nightly"})
    batch = wait_for(client, batch.id)
    assert (batch.status, batch.request_counts.total, batch.request_counts.completed) == ("completed", 150, 150)
    assert batch.error_file_id is None
    assert batch.completed_at >= batch.in_progress_at >= batch.created_at
    found = answers(client, batch.output_file_id)
    assert [line["custom_id"] for line in found] == [f"r{index}" for index in range(150)]
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in found)
    assert found[7]["response"]["body"]["choices"][0]["message"]["content"] == ANSWER
    # Batches yield to everybody else.
    assert {call.priority for call in engine.calls} == {2**31 - 1}


def test_a_line_that_fails_leaves_the_others(client: OpenAI) -> None:
    lines = [
        request_line("good"),
        request_line("wrong model", model="other"),
        request_line("wrong value", temperature=-1),
        request_line("streams", stream=True),
        request_line("background", background=True),
    ]
    batch = wait_for(client, submit(client, lines).id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 4)
    assert [line["custom_id"] for line in answers(client, batch.output_file_id)] == ["good"]
    failed = {line["custom_id"]: line["response"] for line in answers(client, batch.error_file_id)}
    assert failed["wrong model"]["status_code"] == 404
    assert failed["wrong value"]["body"]["error"]["param"] == "temperature"
    assert failed["streams"]["body"]["error"]["param"] == "stream"
    assert failed["background"]["body"]["error"]["param"] == "background"


@pytest.mark.parametrize(
    ("lines", "code", "line"),
    [
        ([], "empty_file", None),
        (["{"], "invalid_json_line", 1),
        (["\xff"], "invalid_json_line", 1),
        (["[]"], "invalid_json_line", 1),
        ([request_line("a"), {**request_line("b"), "method": "GET"}], "invalid_json_line", 2),
        ([{**request_line("a"), "custom_id": 5}], "invalid_json_line", 1),
        ([{**request_line("a"), "body": [1]}], "invalid_body", 1),
        ([{**request_line("a"), "url": "/v1/completions"}], "mismatched_endpoint", 1),
        ([request_line("a"), "", request_line("a")], "duplicate_custom_id", 3),
    ],
)
def test_a_file_with_a_fault_fails_as_a_whole(
    client: OpenAI, engine: ScriptedEngine, lines: list[Any], code: str, line: int | None
) -> None:
    batch = wait_for(client, submit(client, lines).id)
    assert batch.status == "failed"
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, line)
    assert not engine.calls


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "999d"}, "completion_window"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(client: OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        submit(client, [request_line("a")], **change)
    assert error.value.param == param


def test_files_are_listed_and_deleted(client: OpenAI) -> None:
    ids = [client.files.create(file=(f"{name}.jsonl", b"{}"), purpose="batch").id for name in "abc"]
    assert [file.id for file in client.files.list()] == ids[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=1)] == ids  # the client follows the pages
    assert client.files.retrieve(ids[0]).filename == "a.jsonl"
    assert client.files.delete(ids[0]).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(ids[0])
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=ids[0], endpoint=URL, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a", b"x"), purpose="vision")


def test_a_cancelled_batch_keeps_what_was_answered(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.delay = 0.01
    batch = submit(client, [request_line(f"r{index}") for index in range(500)])
    while not client.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.02)
    client.batches.cancel(batch.id)
    batch = wait_for(client, batch.id)
    done, rest = answers(client, batch.output_file_id), answers(client, batch.error_file_id)
    assert batch.status == "cancelled"
    assert done
    assert rest
    assert {line["error"]["code"] for line in rest} == {"batch_cancelled"}
    # Every request has one answer.
    assert sorted(line["custom_id"] for line in done + rest) == sorted(f"r{index}" for index in range(500))
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_a_restarted_server_goes_on(engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.delay = 0.002
    with RunningServer(engine, settings_for(tmp_path)) as server, server.client() as client:
        batch = submit(client, [request_line(f"r{index}") for index in range(120)])
        while client.batches.retrieve(batch.id).request_counts.completed < 40:
            time.sleep(0.02)
    second = ScriptedEngine()
    with RunningServer(second, settings_for(tmp_path)) as server, server.client() as client:
        batch = wait_for(client, batch.id)
        assert batch.status == "completed"
        assert [line["custom_id"] for line in answers(client, batch.output_file_id)] == [f"r{i}" for i in range(120)]
    assert len(second.calls) <= 80  # answered lines are not sent again


def test_an_ended_window_answers_the_rest_with_an_error(tmp_path: Path, engine: ScriptedEngine) -> None:
    engine.delay = 5.0
    with RunningServer(engine, settings_for(tmp_path)) as server, server.client() as client:
        batch = submit(client, [request_line("a", max_tokens=200)], completion_window="1m")
        wait_for(client, batch.id, "in_progress")
    db = sqlite3.connect(tmp_path / "batches.sqlite3")
    db.execute("UPDATE batches SET data = json_set(CAST(data AS TEXT), '$.expires_at', 1)")
    db.commit()
    db.close()
    with RunningServer(ScriptedEngine(), settings_for(tmp_path)) as server, server.client() as client:
        batch = wait_for(client, batch.id)
        assert (batch.status, batch.request_counts.failed) == ("expired", 1)
        assert answers(client, batch.error_file_id)[0]["error"]["code"] == "batch_expired"


def test_a_line_waits_while_the_queue_is_full(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.raises = QueueFullError("9 requests are waiting", retry_after=1)
    batch = submit(client, [request_line("a")])
    wait_for(client, batch.id, "in_progress")
    time.sleep(0.2)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    engine.raises = None
    assert wait_for(client, batch.id).request_counts.completed == 1


def test_accounts_do_not_see_each_other(engine: ScriptedEngine, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, api_key=("one", "two"))
    with RunningServer(engine, settings) as server:
        one, two = (OpenAI(base_url=f"{server.url}/v1", api_key=key) for key in ("one", "two"))
        with one, two:
            batch = wait_for(one, submit(one, [request_line("a")]).id)
            assert not list(two.files.list())
            assert not list(two.batches.list())
            for call in (two.batches.retrieve, two.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    call(batch.id)
            with pytest.raises(openai.NotFoundError):
                two.files.content(batch.output_file_id)
    assert {call.tenant for call in engine.calls}
    assert all(call.cache_salt for call in engine.calls)


def test_a_large_file_is_refused_before_it_is_stored(engine: ScriptedEngine, tmp_path: Path) -> None:
    with (
        RunningServer(engine, settings_for(tmp_path, max_file_size=1000)) as server,
        server.client() as client,
    ):
        with pytest.raises(openai.APIStatusError) as error:
            client.files.create(file=("a", b"x" * 200_000), purpose="batch")
        assert error.value.status_code == 413
        assert not list((tmp_path / "files").iterdir())


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nnonsense", 400),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch', 400),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400),
    ],
)
def test_a_form_that_is_none_is_refused(server: RunningServer, kind: str, body: bytes, status: int) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", "/v1/files", body, {"Content-Type": kind})
    response = connection.getresponse()
    assert (response.status, "error" in json.loads(response.read())) == (status, True)
    connection.close()


def test_without_a_folder_the_routes_say_what_to_do(engine: ScriptedEngine) -> None:
    with (
        RunningServer(engine) as server,
        server.client() as client,
        pytest.raises(openai.NotFoundError, match="--batch-dir"),
    ):
        client.batches.list()


def test_a_folder_serves_one_server(server: RunningServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no other server"):
        BatchStore(tmp_path)
