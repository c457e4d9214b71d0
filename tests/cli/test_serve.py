"""`quire serve` and `quire generate` as a user runs them, with the bundled model."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from quire.cli import serve as serve_module
from quire.cli.serve import embedding_config_for, engine_config_for
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.server.settings import ServerSettings

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
QUIRE = [sys.executable, "-m", "quire"]


def test_serve_until_sigterm() -> None:
    command = [*QUIRE, "serve", "--port", "0", "--threads", "1", "--num-blocks", "64", "--served-model-name", "bard"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            phases: list[str] = []
            while not phases or " listening on http://127.0.0.1:" not in phases[-1]:
                phases.append(server.stderr.readline())
                assert phases[-1], "".join(phases)
            port = int(phases[-1].rpartition(":")[2])
            used = subprocess.run(
                [*QUIRE, "serve", "--port", str(port)], env=ENVIRONMENT, capture_output=True, text=True
            )
            assert used.returncode == 2
            assert f"quire: cannot listen on 127.0.0.1:{port}: address already in use" in used.stderr
            while " ready: bard" not in phases[-1]:
                phases.append(server.stderr.readline())
                assert phases[-1], "".join(phases)
            assert any("KV cache: 64 blocks" in line for line in phases)
            with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                body = json.dumps({"model": "bard", "prompt": "ROMEO:", "max_tokens": 4, "ignore_eos": True})
                connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
                reply = json.loads(connection.getresponse().read())
            assert reply["usage"]["completion_tokens"] == 4
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        finally:
            server.kill()


def test_several_keys_are_scheduled_fairly_unless_a_policy_is_given(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("[[keys]]\nname = 'a'\nkey = 'a'\n")
    one, several = ServerSettings(api_keys=str(file)), ServerSettings(api_keys=str(file), api_key=("b",))
    assert engine_config_for(ServerSettings(), {}).scheduling_policy == "fcfs"
    assert engine_config_for(one, {}).scheduling_policy == "fcfs"
    assert engine_config_for(several, {}).scheduling_policy == "fair"
    assert engine_config_for(several, {"scheduling_policy": "fcfs"}).scheduling_policy == "fcfs"


def test_a_model_that_cannot_be_loaded_is_one_line_and_a_status() -> None:
    command = [*QUIRE, "serve", "--port", "0", "--max-model-len", "1000000"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (2, 3)
    assert "max_model_len is 1000000" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_generate_reads_standard_input() -> None:
    options = ["--max-tokens", "8", "--temperature", "0", "--threads", "1", "--num-blocks", "64"]
    command = [*QUIRE, "generate", *options]
    done = subprocess.run(command, env=ENVIRONMENT, input="JULIET:", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 5


def test_no_address_is_reported_before_the_cheap_checks() -> None:
    for options in (["--max-model-len", "1000000"], ["--prefix-file", "/nowhere/prefixes"], ["/nowhere/model"]):
        command = [*QUIRE, "serve", *options, "--port", "0"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert done.returncode in (2, 3)
        assert "listening on" not in done.stderr


@pytest.mark.parametrize(
    ("cores", "threads", "options", "expected"),
    [
        (8, None, "{}", 4),
        (2, None, "{}", 1),
        (1, None, "{}", 1),
        (3, None, "{}", 1),
        (8, 6, "{}", 3),
        (8, 1, "{}", 1),
        (8, None, '{"threads": 7}', 7),
    ],
)
def test_an_embedder_takes_at_most_half_of_the_cores(
    cores: int, threads: int | None, options: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its texts never hold as many cores as streams beside them can use."""
    monkeypatch.setattr(serve_module, "usable_cores", lambda: cores)
    settings = ServerSettings(embedding_model="vectors", embedding_options=options)
    found = embedding_config_for(settings, EngineConfig(threads=threads, max_queue_size=17))
    assert found is not None
    assert (found.model, found.threads, found.max_queue_size) == ("vectors", expected, 17)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (None, "{}", "embedding_options is set without embedding_model"),
        ("vectors", "{", "embedding_options is not JSON"),
        ("vectors", "[1]", "must be a JSON object"),
        ("vectors", '{"nonsense": 1}', "nonsense"),
        ("vectors", '{"threads": "many"}', "threads"),
    ],
)
def test_options_of_an_embedder_that_do_not_fit(model: str | None, options: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        embedding_config_for(ServerSettings(embedding_model=model, embedding_options=options), EngineConfig())
