"""Traces: the spans that a collector receives, their parents, and what happens without one."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.server.settings import ServerSettings
from quire.server.traces import Traces
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
BODY = {"model": "scripted", "prompt": "x", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7}


class Collector(ThreadingHTTPServer):
    """Keeps the bodies that an exporter posts."""

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.posts: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def spans(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        read = [ExportTraceServiceRequest.FromString(body) for _, body in self.posts]
        return [span for each in read for group in each.resource_spans for s in group.scope_spans for span in s.spans]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        self.server.posts.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk")
    with Collector() as collecting:
        thread = threading.Thread(target=collecting.serve_forever, daemon=True)
        thread.start()
        yield collecting
        collecting.shutdown()


def settings(endpoint: str) -> ServerSettings:
    return ServerSettings(port=0, otlp_traces_endpoint=endpoint)


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {each.key: plain(each.value) for each in span.attributes}


def test_a_span_continues_the_trace_of_its_request(collector: Collector) -> None:
    with RunningServer(ScriptedEngine(), settings(collector.url)) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        server.send("POST", "/v1/completions", BODY, headers)
        server.send("GET", "/health")
    (span,) = collector.spans
    assert {path for path, _ in collector.posts} == {"/v1/traces"}
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE, PARENT)
    found = attributes(span)
    assert {name: value for name, value in found.items() if "latency" not in name} == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": "scripted",
        "gen_ai.response.model": "scripted",
        "gen_ai.request.id": "mine",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.n": 1,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.prompt_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
    }
    latencies = {name.rpartition(".")[2]: value for name, value in found.items() if "latency" in name}
    assert 0 <= latencies["time_in_queue"] <= latencies["time_to_first_token"] <= latencies["e2e"]
    assert set(latencies) >= {"time_in_model_prefill", "time_in_model_decode", "time_in_model_inference"}
    assert span.end_time_unix_nano - span.start_time_unix_nano >= latencies["time_in_model_inference"] * 1e9


def test_each_prompt_has_a_span_and_a_chat_is_one(collector: Collector) -> None:
    with RunningServer(ScriptedEngine(), settings(f"{collector.url}/custom/path")) as server:
        server.send("POST", "/v1/completions", {**BODY, "prompt": ["x", "y"]})
        server.send("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
        server.send("POST", "/v1/completions", {**BODY, "temperature": -1})
    assert {path for path, _ in collector.posts} == {"/custom/path"}
    assert sorted(attributes(span)["gen_ai.operation.name"] for span in collector.spans) == [
        "chat",
        "text_completion",
        "text_completion",
    ]
    assert all(not span.parent_span_id for span in collector.spans)


def test_a_failure_and_a_client_that_left_are_errors(collector: Collector) -> None:
    failing = ScriptedEngine(raises=RuntimeError("a rare fault"), raises_at=1)
    with RunningServer(failing, settings(collector.url)) as server:
        server.send("POST", "/v1/completions", BODY)
    endless = ScriptedEngine(endless=True, delay=0.005, max_model_len=2**20)
    with RunningServer(endless, settings(collector.url)) as server:
        stream = server.client().completions.create(model="scripted", prompt="x", max_tokens=10**5, stream=True)
        next(iter(stream))
        stream.close()
        while endless.num_running:
            pass
    failed, left = collector.spans
    assert (failed.status.code, failed.status.message) == (2, "a rare fault")
    assert attributes(failed)["error.type"] == "RuntimeError"
    assert left.status.message == "the client left before the answer was complete"
    assert attributes(left)["gen_ai.usage.output_tokens"] >= 1


def test_no_text_is_sent(collector: Collector) -> None:
    with RunningServer(ScriptedEngine(), settings(collector.url)) as server:
        server.send("POST", "/v1/completions", {**BODY, "prompt": "a secret thing", "max_tokens": 40})
    assert collector.spans
    for _, body in collector.posts:
        assert b"secret" not in body
        assert b"To be" not in body


def test_a_collector_that_is_not_there_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")
    with RunningServer(ScriptedEngine(), settings("http://127.0.0.1:1")) as server:
        assert server.send("POST", "/v1/completions", BODY)[0].status == 200


@pytest.mark.parametrize("endpoint", ["grpc://127.0.0.1:4317", "127.0.0.1:4318", "http://", ""])
def test_endpoints_that_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint is .* http://127.0.0.1:4318"):
        settings(endpoint)


def test_the_package_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"pip install 'quire-llm\[otel\]'"):
        Traces.open(settings("http://127.0.0.1:4318"))
    assert Traces.open(ServerSettings()) is None
