"""What servers and `quire router` agree on: marks in streams, progress, ids, and the blocks of a prompt."""

import base64
import json
from typing import Any

import pytest

from quire.engine.limits import resumed
from quire.engine.messages import Add
from quire.engine.request_streams import RequestStreams
from quire.errors import EngineUnavailableError, RequestError
from quire.kv_cache.block_hash import hash_block, root_hash
from quire.outputs import CompletionOutput, SequenceDelta, StepDeltas
from quire.request import PrefilledPrompt, Request, SampleProgress
from quire.router.marked_stream import BrokenStreamError, MarkedStream
from quire.sampling_params import SamplingParams
from quire.server.handover import Handover, decode_progress, encode_progress, mark
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine, bundled_tokenizer

ID = "0123456789abcdef0123456789abcdef"
STREAM = {"x-quire-stream": f"{ID} 1700000000 0"}
PROMPT = "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer"
BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": PROMPT, "n": 2}, f"cmpl-{ID}"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}, f"chatcmpl-{ID}"),
    ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 9}, f"msg_{ID}"),
    ("/api/chat", {"model": "scripted", "messages": [{"role": "user", "content": PROMPT}]}, ""),
]


@pytest.mark.parametrize(("path", "body", "answer_id"), BODIES)
def test_without_its_marks_a_marked_stream_is_the_plain_one(
    server: RunningServer, engine: ScriptedEngine, path: str, body: dict[str, Any], answer_id: str
) -> None:
    body = {**body, "stream": True}
    _, plain = server.send("POST", path, body)
    response, content = server.send("POST", path, body, STREAM)
    assert response.headers["x-quire-stream"] == "marked"
    stream = MarkedStream()
    shown = b"".join(stream.feed(content.encode())) + stream.end()
    assert b": quire" not in shown
    assert normal(shown.decode(), answer_id) == normal(plain, answer_id)
    assert answer_id.encode() in shown
    # The last steps count only with the end of the answer.
    tokens = bundled_tokenizer().encode(engine.answer, add_special_tokens=False)
    limit = min(len(tokens), body.get("max_tokens", len(tokens)))
    for sample in stream.progress.values():
        assert sample.token_ids == tokens[: limit - 1]


def normal(content: str, answer_id: str) -> list[str]:
    """A stream without what differs from one answer to the next."""
    lines = []
    for line in content.splitlines():
        start = line.find("{")
        if start >= 0:
            fields = json.loads(line[start:])
            for name in ("id", "created", "created_at", "message"):
                fields.pop(name, None) if name != "message" or answer_id.startswith("msg_") else None
            fields = {name: value for name, value in fields.items() if "duration" not in name}
            line = line[:start] + json.dumps(fields)
        lines.append(line)
    return lines


@pytest.mark.parametrize(("path", "body", "answer_id"), BODIES)
def test_the_blocks_of_a_prompt_are_the_engines(
    server: RunningServer, engine: ScriptedEngine, path: str, body: dict[str, Any], answer_id: str
) -> None:
    """With the salt of the request, and without computing anything."""
    for salt in ("", "mine"):
        salted = {**body, "cache_salt": salt} if salt else body
        _, blocks = server.send("POST", path, salted, {"x-quire-prompt": "blocks"})
        assert engine.calls == []
        server.send("POST", path, salted)
        call = engine.calls.pop()
        parent, hashes = root_hash(call.cache_salt, 16), []
        for start in range(0, len(call.prompt) // 16 * 16, 16):
            parent = hash_block(parent, call.prompt[start : start + 16])
            hashes.append(parent[-8:])
        assert base64.b64decode(blocks["hashes"]) == b"".join(hashes) != b""
        assert (blocks["num_tokens"], blocks["block_size"]) == (len(call.prompt), 16)


@pytest.mark.parametrize(("path", "body", "answer_id"), BODIES)
def test_a_prompt_is_computed_for_another_server(
    server: RunningServer, engine: ScriptedEngine, path: str, body: dict[str, Any], answer_id: str
) -> None:
    """By one token, whatever the answer should be; the other server's engine learns that it was."""
    asked = {**body, "n": 3, "logprobs": True, "stop": ["x"]} if path == "/v1/chat/completions" else body
    _, blocks = server.send("POST", path, asked, {"x-quire-prompt": "compute"})
    (call,) = engine.calls
    assert (call.params.max_tokens, call.params.n, call.params.logprobs, call.params.stop) == (1, 1, None, ())
    assert type(call.prompt) is list
    engine.calls.clear()
    assert blocks == server.send("POST", path, asked, {"x-quire-prompt": "blocks"})[1]
    server.send("POST", path, body, {"x-quire-prefilled": "1"})
    assert isinstance(engine.calls[0].prompt, PrefilledPrompt)
    assert engine.calls[0].prompt == call.prompt


def test_salts_of_keys_are_in_the_blocks() -> None:
    settings = ServerSettings(port=0, api_key=("one", "two"))
    with RunningServer(ScriptedEngine(), settings) as server:
        hashes = [
            server.send(
                "POST", "/v1/completions", {"prompt": PROMPT}, {"x-quire-prompt": "1", "authorization": f"Bearer {key}"}
            )[1]["hashes"]
            for key in ("one", "two", "one")
        ]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("header", ["", "x", f"{ID} 1", f"{ID} 1 -1", f"{ID} y 0", "short 1 0", f"{ID} 1 0 0"])
def test_a_forged_header_is_refused(server: RunningServer, header: str) -> None:
    response, body = server.send("POST", "/v1/completions", {"prompt": "a"}, {"x-quire-stream": header})
    assert (response.status, body["error"]["param"]) == (400, "x-quire-stream")


@pytest.mark.parametrize("progress", [b"x", b"[1]", b'[[0,["a"],null]]', b'{"a":1}', b"\xff"])
def test_progress_that_is_none_is_refused(server: RunningServer, progress: bytes) -> None:
    header = f"{ID} 1 {len(progress)}"
    response, body = server.send("POST", "/v1/completions", progress + b'{"prompt": "a"}', {"x-quire-stream": header})
    assert (response.status, body["error"]["param"]) == (400, "x-quire-stream")


def test_a_server_that_goes_away_says_so_to_the_router() -> None:
    engine = ScriptedEngine(raises=EngineUnavailableError("the server is shutting down"), raises_at=3)
    with RunningServer(engine) as server:
        _, content = server.send("POST", "/v1/completions", {"prompt": "a", "stream": True}, STREAM)
        stream = MarkedStream()
        events: list[bytes] = []
        with pytest.raises(BrokenStreamError, match="going away"):
            events.extend(stream.feed(content.encode()))
        assert len(stream.progress[0].token_ids) == 3
        _, plain = server.send("POST", "/v1/completions", {"prompt": "a", "stream": True})
        assert "shutting down" in plain


def request(n: int = 1, **options: Any) -> Request:
    params = SamplingParams(n=n, max_tokens=10, temperature=0.0, **options)
    return Request(request_id="r", prompt_token_ids=[1, 2, 3], params=params, max_tokens=10)


def test_an_answer_is_replayed_and_goes_on() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode("To be, or not to be", add_special_tokens=False)
    sent: list[Any] = []
    streams = RequestStreams(tokenizer, sent.append)
    progress = {0: SampleProgress(ids[:3]), 1: SampleProgress(ids[:2], "length")}
    stream = streams.open(resumed(request(2), progress, vocab_size=10_000), None, None, progress)
    assert stream.replayed is not None
    text = {sample.index: sample.text for sample in stream.replayed.outputs}
    assert [sample.finish_reason for sample in stream.replayed.outputs] == [None, "length"]
    (add,) = sent
    assert isinstance(add, Add)
    assert add.request.output_token_ids == {0: ids[:3]}
    streams.deliver(StepDeltas(others=[SequenceDelta("r", 0, ids[3:], finish_reason="length")]))
    output = stream.take()
    assert output is not None
    assert output.finished
    assert text[0] + output.outputs[0].text == "To be, or not to be"


def test_an_answer_that_was_complete_needs_no_engine() -> None:
    sent: list[Any] = []
    streams = RequestStreams(bundled_tokenizer(), sent.append)
    progress = {0: SampleProgress([40, 41], "stop")}
    stream = streams.open(resumed(request(), progress, vocab_size=1000), None, None, progress)
    assert stream.replayed is not None
    assert stream.replayed.finished
    assert sent == []
    streams.close(stream)
    assert sent == []
    assert len(streams) == 0


@pytest.mark.parametrize(
    ("made", "progress", "message"),
    [
        (request(), {1: SampleProgress([4])}, "sample 1; the request has 1"),
        (request(), {0: SampleProgress([99])}, "vocabulary"),
        (request(), {0: SampleProgress([4] * 10)}, "10 tokens of a sample; max_tokens is 10"),
        (request(), {0: SampleProgress([4] * 11, "length")}, "11 tokens"),
        (request(2, beam_width=2), {0: SampleProgress([4])}, "beams"),
    ],
)
def test_progress_that_no_engine_makes_is_refused(
    made: Request, progress: dict[int, SampleProgress], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        resumed(made, progress, vocab_size=50)


def test_progress_survives_the_wire() -> None:
    progress = {0: SampleProgress([1, 2]), 3: SampleProgress([], "stop")}
    assert decode_progress(encode_progress(progress)) == progress
    handover = Handover(ID, 17, 5)
    assert Handover.from_header(handover.header()) == handover


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_marks_are_found_however_the_bytes_are_cut(size: int) -> None:
    """A mark counts when it is complete; text that looks like one is no mark."""
    events = [b'data: {"text": ": quire [[0,[9],null]]"}\n\n', b"", b'data: {"text": "\\n: quire "}\n\n']
    content = b"".join(event + mark([(0, CompletionOutput(0, "", [number]))]) for number, event in enumerate(events))
    stream = MarkedStream()
    shown = b""
    for start in range(0, len(content), size):
        shown += b"".join(stream.feed(content[start : start + size]))
    assert shown == b"".join(events)
    assert stream.progress == {0: SampleProgress([0, 1, 2])}
    assert stream.num_tokens == 3
    list(stream.feed(b"data: cut"))
    stream.cut()
    assert stream.end() == b""
