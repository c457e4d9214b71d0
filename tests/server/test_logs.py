"""Lines of the log: their form, and the access line of each request."""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.server.logs import JsonFormatter, TextFormatter, configure_logging, request_id
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

COMPLETION = {"prompt": "To be", "max_tokens": 3}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Loggers as they were before the test."""
    root, access = logging.getLogger(), logging.getLogger("quire.access")
    before = root.handlers[:], root.level, access.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    access.setLevel(before[2])


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("quire.x", logging.WARNING, "x.py", 1, message, (), None)
    made.__dict__.update(extra)
    return made


def written(capfd: pytest.CaptureFixture[str]) -> str:
    """What was logged since the last call."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    return capfd.readouterr().err


def served(capfd: pytest.CaptureFixture[str], **options: object) -> list[str]:
    """The lines that a server logs for a completion, an embedding, a refusal and three probes."""
    settings = ServerSettings(port=0, access_log=True, **options)  # type: ignore[arg-type]
    configure_logging(settings)
    with RunningServer(ScriptedEngine(), settings) as server:
        server.send("POST", "/v1/completions", COMPLETION, {"x-request-id": "mine"})
        server.send("POST", "/v1/completions", {**COMPLETION, "stream": True})
        server.send("POST", "/v1/embeddings", {"input": [[1, 2, 3], [4]]})
        server.send("GET", "/no%0Asuch", headers={"x-request-id": "a status=200"})
        for path in ("/health", "/health/live", "/health/ready"):
            server.send("GET", path)
    return written(capfd).splitlines()


def test_an_access_line_of_json_has_time_request_id_tokens_and_milliseconds(capfd: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in served(capfd, log_format="json")]
    assert [line["status"] for line in lines] == [200, 200, 200, 404]
    whole, streamed, embedded, missing = lines
    assert whole["request_id"] == "mine"
    assert whole["message"] == "POST /v1/completions"
    assert (whole["level"], whole["logger"], whole["client"]) == ("INFO", "quire.access", "127.0.0.1")
    for line in (whole, streamed):
        assert (line["completion_tokens"], line["cached_tokens"]) == (3, 2)
        assert line["prompt_tokens"] > 0
    assert (embedded["prompt_tokens"], embedded["completion_tokens"]) == (4, 0)
    assert "prompt_tokens" not in missing
    assert len({line["request_id"] for line in lines}) == 4
    for line in lines:
        assert 0 <= line["ms"] < 20_000
        assert abs((datetime.now(UTC) - datetime.fromisoformat(line["time"])).total_seconds()) < 60


def test_an_access_line_names_the_key_and_never_shows_it(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """So that the lines are an audit log: who asked what, when, and what came of it."""
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nname = "alice"\nkey = "secret-of-alice"\n')
    settings = ServerSettings(port=0, access_log=True, log_format="json", api_key=("secret-plain",), api_keys=str(keys))
    configure_logging(settings)
    sent = ({"authorization": "Bearer secret-of-alice"}, {"x-api-key": "secret-plain"}, {"x-api-key": "secret-wrong"})
    with RunningServer(ScriptedEngine(), settings) as server:
        for headers in sent:
            server.send("POST", "/v1/completions", COMPLETION, headers)
    lines = written(capfd)
    found = [(line["status"], line.get("key")) for line in map(json.loads, lines.splitlines())]
    assert found == [(200, "alice"), (200, sha256(b"secret-plain").hexdigest()[:8]), (401, None)]
    assert "secret" not in lines


def test_an_access_line_of_text_cannot_be_forged(capfd: pytest.CaptureFixture[str]) -> None:
    whole, _, _, missing = served(capfd)
    assert " INFO quire.access: POST /v1/completions status=200 ms=" in whole
    assert " completion_tokens=3 " in whole
    assert whole.endswith(" request_id=mine")
    assert " GET /no%0Asuch status=404 " in missing
    assert missing.endswith(' request_id="a status=200"')


def test_no_access_line_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    assert served(capfd) != []
    configure_logging(ServerSettings(port=0))
    with RunningServer(ScriptedEngine()) as server:
        server.send("POST", "/v1/completions", COMPLETION)
    assert written(capfd) == ""


def test_every_line_in_a_request_has_its_id(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging(ServerSettings(log_format="json"))
    with RunningServer(ScriptedEngine(raises=ValueError("a bug"))) as server:
        response, _ = server.send("POST", "/v1/completions", COMPLETION, {"x-request-id": "faulty"})
    assert response.status == 500
    line = json.loads(written(capfd))
    assert (line["level"], line["request_id"]) == ("ERROR", "faulty")
    assert "ValueError: a bug" in line["exception"]


def test_forms_of_a_line() -> None:
    try:
        raise KeyError("x")
    except KeyError:
        failed = record("it failed", exc_info=sys.exc_info())
    assert "\n" not in JsonFormatter().format(failed)
    assert TextFormatter().format(failed).splitlines()[-1] == "KeyError: 'x'"
    plain = record("hello", created=0.25)
    assert TextFormatter().format(plain) == "1970-01-01T00:00:00.250Z WARNING quire.x: hello"
    token = request_id.set("r1")
    try:
        assert json.loads(JsonFormatter().format(plain)) == {
            "time": "1970-01-01T00:00:00.250Z",
            "level": "WARNING",
            "logger": "quire.x",
            "message": "hello",
            "request_id": "r1",
        }
    finally:
        request_id.reset(token)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="log_format is 'xml'; it must be text or json"):
        ServerSettings(log_format="xml")


@pytest.mark.parametrize("given", ["/llm", "/llm/"])
def test_a_server_under_a_path(given: str) -> None:
    settings = ServerSettings(port=0, root_path=given, api_key=("k",))
    with RunningServer(ScriptedEngine(), settings) as server:
        key = {"authorization": "Bearer k"}
        for prefix in ("", "/llm"):
            assert server.send("GET", f"{prefix}/health")[0].status == 200
            assert server.send("GET", f"{prefix}/v1/models")[0].status == 401
            assert server.send("GET", f"{prefix}/v1/models", headers=key)[0].status == 200
            assert server.send("GET", f"{prefix}/openapi.json", headers=key)[1]["servers"] == [{"url": "/llm"}]
        response, _ = server.send("GET", "/llm")
        assert (response.status, response.headers["location"]) == (307, "llm/")  # the page
        for other in ("/llmx/health", "/llm/llm/health", "/x/health"):
            assert server.send("GET", other, headers=key)[0].status == 404


@pytest.mark.parametrize("given", ["llm", "/a b", "/a//b", "http://x/llm", "/ü"])
def test_a_root_path_that_is_no_path_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"root_path is .*; give a path such as /llm"):
        ServerSettings(root_path=given)
