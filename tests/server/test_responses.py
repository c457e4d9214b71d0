"""/v1/responses through the openai client."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError

from quire.errors import ConfigError, EngineUnavailableError
from quire.server.responses import runs
from quire.server.responses.items import input_items, to_messages
from quire.server.responses.protocol import Reasoning, ResponseObject, TextConfig
from quire.server.responses.store import ResponseStore, StoredResponse
from quire.server.settings import ServerSettings
from quire.server.store_faults import StoreFailedError
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine, bundled_tokenizer

NUM_TOKENS = len(bundled_tokenizer().encode(ANSWER, add_special_tokens=False))


def prompt_text(engine: ScriptedEngine) -> str:
    return bundled_tokenizer().decode(engine.calls[-1].prompt, skip_special_tokens=False)


def test_answers(client: OpenAI, engine: ScriptedEngine) -> None:
    response = client.responses.create(
        model="scripted", input="Who goes there?", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5
    )
    assert response.output_text == ANSWER
    assert response.status == "completed"
    (message,) = response.output
    assert message.type == "message"
    assert message.status == "completed"
    assert (response.temperature, response.metadata) == (0.5, {"a": "b"})
    assert response.usage is not None
    assert response.usage.output_tokens == NUM_TOKENS
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert response.usage.total_tokens == NUM_TOKENS + response.usage.input_tokens
    assert response.completed_at is not None
    assert "<|system|>Be brief." in prompt_text(engine)
    assert engine.calls[0].params.max_tokens is None


def test_a_limit_makes_it_incomplete(client: OpenAI) -> None:
    response = client.responses.create(model="scripted", input="x", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]  # a message has one
    *_, last = client.responses.create(model="scripted", input="x", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_events_come_in_order(client: OpenAI) -> None:
    events = list(client.responses.create(model="scripted", input="x", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    deltas = names.count("output_text.delta")
    assert deltas == NUM_TOKENS
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    last: Any = events[-1]
    added: Any = events[2]
    done: Any = events[-4]
    assert last.response.output_text == done.text == ANSWER
    assert last.response.output[0].id == added.item.id == done.item_id
    assert last.response.usage.output_tokens == NUM_TOKENS
    with client.responses.stream(model="scripted", input="x") as stream:  # the client's own accumulator
        assert stream.get_final_response().output_text == ANSWER


def test_reasoning_and_calls(engine: ScriptedEngine) -> None:
    engine.answer = '<think>Hm.</think>Let me look.<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>'
    tools: Any = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}]
    settings = ServerSettings(port=0, tool_call_parser="hermes", reasoning_parser="qwen3")
    with RunningServer(engine, settings) as server, server.client() as client:
        whole: Any = client.responses.create(model="scripted", input="x", tools=tools)
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        assert whole.output[0].content[0].text == "Hm."
        assert (whole.output[2].name, whole.output[2].arguments) == ("f", '{"a": [1]}')
        assert whole.usage.output_tokens_details.reasoning_tokens > 0
        events: list[Any] = list(client.responses.create(model="scripted", input="x", tools=tools, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        names = [event.type.removeprefix("response.") for event in events if not event.type.endswith("delta")]
        assert names == [
            *("created", "in_progress"),
            *("output_item.added", "content_part.added", "reasoning_text.done", "content_part.done"),
            *("output_item.done", "output_item.added", "content_part.added", "output_text.done", "content_part.done"),
            *("output_item.done", "output_item.added", "function_call_arguments.done", "output_item.done"),
            "completed",
        ]
        final = events[-1].response
        assert [item.type for item in final.output] == [item.type for item in whole.output]
        done = next(event for event in events if event.type.endswith("arguments.done"))
        assert (done.name, done.arguments) == ("f", '{"a": [1]}')
        deltas = [event.delta for event in events if event.type.endswith("arguments.delta")]
        assert "".join(deltas) == done.arguments
        result: Any = {"type": "function_call_output", "call_id": whole.output[2].call_id, "output": "A ghost"}
        for given in ({"previous_response_id": whole.id, "input": [result]}, {"input": [*whole.output, result]}):
            client.responses.create(model="scripted", tools=tools, **given)
            assert "Let me look." in prompt_text(engine)
            assert "A ghost" in prompt_text(engine)
        forced: Any = {"type": "function", "name": "f"}
        client.responses.create(model="scripted", input="x", tools=tools, tool_choice=forced)
        assert engine.calls[-1].params.structured_outputs is not None


def test_logprobs(client: OpenAI) -> None:
    asked: Any = {"model": "scripted", "input": "x", "top_logprobs": 2, "max_output_tokens": 4}
    asked["include"] = ["message.output_text.logprobs"]
    whole: Any = client.responses.create(**asked)
    entries = whole.output[0].content[0].logprobs
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 4
    events: list[Any] = list(client.responses.create(**asked, stream=True))
    streamed = [entry.logprob for event in events if event.type.endswith("text.delta") for entry in event.logprobs]
    assert streamed == [entry.logprob for entry in entries]


def test_a_conversation_continues(client: OpenAI, engine: ScriptedEngine) -> None:
    first = client.responses.create(model="scripted", input="One", instructions="Only now.")
    for stream in (False, True):
        asked: Any = {"model": "scripted", "input": "Two", "previous_response_id": first.id}
        if stream:
            *_, last = client.responses.create(**asked, stream=True)
            second: Any = last.response  # type: ignore[union-attr]  # the last event has one
        else:
            second = client.responses.create(**asked)
        assert "<|user|>One" in prompt_text(engine)
        assert f"<|assistant|>{ANSWER}" in prompt_text(engine)
        assert "Only now." not in prompt_text(engine)
        client.responses.create(model="scripted", input="Three", previous_response_id=second.id)
        assert prompt_text(engine).count(ANSWER) == 2
        assert "<|user|>Two" in prompt_text(engine)


def test_store_retrieve_delete(client: OpenAI) -> None:
    response = client.responses.create(model="scripted", input=[{"role": "user", "content": "One"}] * 3)
    assert client.responses.retrieve(response.id) == response
    items = client.responses.input_items.list(response.id, limit=2, order="asc")
    assert len(items.data) == 2
    assert items.has_more
    assert len(list(items)) == 3, "the client follows the pages"
    assert items.data[0].content[0].text == "One"  # type: ignore[union-attr]  # an input message
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(NotFoundError):
            call(response.id)
    with pytest.raises(BadRequestError) as refused:
        client.responses.create(model="scripted", input="x", previous_response_id=response.id)
    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"
    unkept = client.responses.create(model="scripted", input="x", store=False)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(unkept.id)


def test_other_keys_do_not_see_a_response(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=("one", "two"))) as server:
        response = server.client("one").responses.create(model="scripted", input="x")
        assert server.client("one").responses.retrieve(response.id)
        with pytest.raises(NotFoundError):
            server.client("two").responses.retrieve(response.id)
        with pytest.raises(BadRequestError):
            server.client("two").responses.create(model="scripted", input="x", previous_response_id=response.id)


def until_ended(client: OpenAI, response_id: str) -> Any:
    deadline = time.monotonic() + 10
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return response


def test_background(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.delay = 0.01
    queued = client.responses.create(model="scripted", input="x", background=True)
    assert queued.status == "queued"
    with pytest.raises(BadRequestError, match="wait until it ends"):
        client.responses.create(model="scripted", input="x", previous_response_id=queued.id)
    events: list[Any] = list(client.responses.retrieve(queued.id, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == ANSWER
    rest: list[Any] = list(client.responses.retrieve(queued.id, stream=True, starting_after=5))
    assert [event.sequence_number for event in rest] == list(range(6, len(events)))
    response = until_ended(client, queued.id)
    assert response.output_text == ANSWER
    assert response.background
    assert client.responses.cancel(queued.id).status == "completed"
    streamed: list[Any] = list(client.responses.create(model="scripted", input="x", background=True, stream=True))
    assert streamed[-1].response.status == "completed"


def test_a_client_may_leave_a_background_response(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.delay = 0.01
    stream = client.responses.create(model="scripted", input="x", background=True, stream=True)
    first: Any = next(iter(stream))
    stream.close()
    assert until_ended(client, first.response.id).output_text == ANSWER


def test_cancel(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.delay, engine.endless, engine.max_model_len = 0.01, True, 2**20
    queued = client.responses.create(model="scripted", input="x", max_output_tokens=10**5, background=True)
    next(iter(client.responses.retrieve(queued.id, stream=True)))
    assert engine.num_running == 1
    assert client.responses.cancel(queued.id).status == "cancelled"
    assert engine.num_running == 0
    assert client.responses.retrieve(queued.id).status == "cancelled"
    engine.endless = False
    done = client.responses.create(model="scripted", input="x", max_output_tokens=2)
    with pytest.raises(BadRequestError, match="background"):
        client.responses.cancel(done.id)


def test_a_refused_background_response_is_not_kept(
    client: OpenAI, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MAX_RUNS", 0)
    saved: list[str] = []
    save = ResponseStore.save

    async def record(store: ResponseStore, account: str, stored: StoredResponse) -> None:
        saved.append(stored.response.id)
        await save(store, account, stored)

    monkeypatch.setattr(ResponseStore, "save", record)
    with pytest.raises(RateLimitError, match="0 responses run in the background"):
        client.with_options(max_retries=0).responses.create(model="scripted", input="x", background=True)
    assert not saved


def test_a_stream_that_lacks_events_says_so(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_EVENT_BYTES", 4000)
    created: Any = client.responses.create(model="scripted", input="x", background=True, stream=True)
    *_, last = created
    assert last.type == "error"
    assert "retrieve it without stream" in last.message


def test_failures(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.raises, engine.raises_at = EngineUnavailableError("the engine is being restarted"), 3
    events: list[Any] = list(client.responses.create(model="scripted", input="x", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    queued = client.responses.create(model="scripted", input="x", background=True)
    response = until_ended(client, queued.id)
    assert response.status == "failed"
    assert "restarted" in response.error.message


def test_text_format_and_effort_reach_the_engine(client: OpenAI, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    client.responses.create(
        model="scripted", input="x", text=text, reasoning={"effort": "low"}, extra_body={"top_k": 3}
    )
    params = engine.calls[-1].params
    assert params.structured_outputs is not None
    assert '"a"' in str(params.structured_outputs.json)
    assert params.top_k == 3


def test_truncation_leaves_out_the_oldest(client: OpenAI, engine: ScriptedEngine) -> None:
    turns: list[Any] = [{"role": "user", "content": f"turn {number} " + "word " * 30} for number in range(12)]
    asked: Any = {"model": "scripted", "input": turns, "instructions": "Keep me.", "max_output_tokens": 5}
    with pytest.raises(BadRequestError) as refused:
        client.responses.create(**asked)
    assert refused.value.param == "input"
    response = client.responses.create(**asked, truncation="auto")
    assert response.truncation == "auto"
    assert "turn 11" in prompt_text(engine)
    assert "turn 0" not in prompt_text(engine)
    assert "Keep me." in prompt_text(engine)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input"),
        ({"input": [{"type": 5}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"temperature": -1}, "temperature"),
        ({"truncation": "maybe"}, "truncation"),
    ],
)
def test_refuses_by_name(client: OpenAI, engine: ScriptedEngine, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as refused:
            client.responses.create(model="scripted", input="x", stream=stream, extra_body=fields)
        assert refused.value.param == param
    assert engine.calls == []


def test_items_become_messages() -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "d"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "e"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "f"}]},
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "cut"}]},
    ]
    messages = to_messages(input_items(items))
    assert [(message.role, message.content) for message in messages] == [
        *(("developer", "a\nb"), ("user", "c"), ("assistant", "d"), ("tool", "e"), ("tool", "f")),
    ]
    assert messages[2].reasoning == "hm"
    assert [call["function"]["name"] for call in messages[2].tool_calls or ()] == ["f", "g"]
    assert messages[4].tool_call_id == "2"


def stored(number: int, status: str = "completed", previous: str | None = None, size: int = 0) -> StoredResponse:
    response = ResponseObject(
        id=f"resp_{number}",
        created_at=number,
        model="m",
        status=status,
        output=[{"type": "message", "role": "assistant", "content": "x" * size}],
        metadata={},
        previous_response_id=previous,
        reasoning=Reasoning(),
        temperature=1.0,
        text=TextConfig(),
        tools=[],
        top_p=1.0,
    )
    return StoredResponse(response, [])


def test_a_file_keeps_responses_and_ends_interrupted_ones(tmp_path: Path) -> None:
    path = str(tmp_path / "folder" / "responses.db")
    dies = f"""if True:
        import asyncio, os
        from quire.server.responses.store import ResponseStore
        from tests.server.test_responses import stored
        store = ResponseStore({path!r}, 10**6)
        asyncio.run(store.save("", stored(1)))
        asyncio.run(store.save("", stored(2, "in_progress", "resp_1")))
        os.kill(os.getpid(), 9)"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", dies], env=environment, timeout=120).returncode == -9
    again = ResponseStore(path, 10**6)
    first, second = (asyncio.run(again.load("", f"resp_{number}")) for number in (1, 2))
    assert first == stored(1)
    assert second is not None
    assert second.response.status == "failed"
    assert len(asyncio.run(again.history("", "resp_2"))) == 2
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "folder").iterdir()}
    assert set(modes.values()) == {0o600}, modes
    (tmp_path / "text").write_text("no database" * 100)
    for wrong in (tmp_path / "text", tmp_path, tmp_path / "text" / "x"):
        with pytest.raises(ConfigError, match="responses_store"):
            ResponseStore(str(wrong), 10**6)


def test_several_servers_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")

    async def scenario() -> None:
        first = ResponseStore(path, 10**6)
        await first.save("", stored(1, "in_progress"))
        second = ResponseStore(path, 10**6)
        assert await second.load("", "resp_1") == stored(1, "in_progress")  # its server lives
        await first.save("", stored(1))
        assert await second.load("", "resp_1") == stored(1)
        for number in range(60):  # both count what both keep
            await (first, second)[number % 2].save("", stored(number, size=50_000))
        kept = [await first.load("", f"resp_{number}") is not None for number in range(60)]
        assert 4 <= sum(kept) <= 19  # 10**6 bytes; the 16 oldest go at a time
        assert kept[-1]

    asyncio.run(scenario())


def test_a_file_of_an_older_version(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    asyncio.run(ResponseStore(path, 10**6).save("", stored(1, "in_progress", size=1000)))
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE responses DROP COLUMN owner")
        database.execute("DROP TABLE kept")
    database.close()
    store = ResponseStore(path, 10**6)
    found = asyncio.run(store.load("", "resp_1"))
    assert found is not None
    assert found.response.status == "failed"


def test_a_server_leaves_what_another_generates(engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.delay, engine.endless, engine.max_model_len = 0.01, True, 2**20
    settings = ServerSettings(port=0, responses_store=str(tmp_path / "responses.db"))
    with RunningServer(engine, settings) as one, RunningServer(ScriptedEngine(), settings) as other:
        queued = one.client().responses.create(model="scripted", input="x", max_output_tokens=10**5, background=True)
        assert other.client().responses.retrieve(queued.id).status in ("queued", "in_progress")
        for change in (other.client().responses.cancel, other.client().responses.delete):
            with pytest.raises(BadRequestError, match="this server does not generate"):
                change(queued.id)
        one.client().responses.cancel(queued.id)
        assert other.client().responses.cancel(queued.id).status == "cancelled"
        other.client().responses.delete(queued.id)


def test_the_oldest_make_room() -> None:
    async def scenario() -> list[bool]:
        store = ResponseStore(None, 100_000)
        for number in range(200):
            await store.save("", stored(number, size=2000))
            await store.save("", stored(number, size=2000))  # replaces, and counts once
        await store.save("", stored(1000, size=200_000))  # larger than the store
        return [await store.load("", f"resp_{number}") is not None for number in (0, 100, 195, 199, 1000)]

    assert asyncio.run(scenario()) == [False, False, True, True, False]


def test_tools_that_run_elsewhere_are_left_out_with_a_warning(server: RunningServer) -> None:
    body = {"input": "x", "max_output_tokens": 3, "tool_choice": "auto"}
    body["tools"] = [{"type": "web_search", "external_web_access": False}]
    response, _ = server.send("POST", "/v1/responses", body)
    assert response.status == 200
    assert "web_search run on OpenAI" in response.headers["x-quire-warning"]


def test_a_full_disk_keeps_what_is_stored() -> None:
    store = ResponseStore(None, 10**7)
    asyncio.run(store.save("", stored(1)))
    (num_pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {num_pages}")
    for number in (1, 2):
        with pytest.raises(StoreFailedError, match="the disk is full"):
            asyncio.run(store.save("", stored(number, size=10**6)))
    assert asyncio.run(store.load("", "resp_1")) == stored(1)
    asyncio.run(store.save("", stored(1, "failed")))
    assert asyncio.run(store.load("", "resp_1")) == stored(1, "failed")
