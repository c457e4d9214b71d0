"""`quire run`: what it fetches, the server it starts and ends, and one question from a script."""

import io
import os
import sys
import time
from pathlib import Path

import pytest

from quire.cli import run as command
from quire.cli.commands import run
from quire.cli.run import fetch, serve_command, whole_prompt
from quire.errors import CheckpointError, ConfigError
from tests.server.scripted_engine import ANSWER

SERVER = """
import asyncio, os, sys
from tests.server.scripted_engine import ScriptedEngine
from quire.server.listen import serve
from quire.server.settings import ServerSettings
from quire.server.sockets import bind
open(sys.argv[2], "w").write(str(os.getpid()))
settings = ServerSettings(port=int(sys.argv[1]))
engine = ScriptedEngine(load_seconds=0.3, max_model_len=4096)
sys.exit(0 if asyncio.run(serve(engine, settings, bind(settings), report=lambda line: None)) else 1)
"""


@pytest.fixture(autouse=True)
def nothing_is_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_question_from_a_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is the answer alone, and nothing is left behind."""
    note = tmp_path / "pid"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(
        command, "serve_command", lambda m, url, o: [sys.executable, "-c", SERVER, url.rpartition(":")[2], str(note)]
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("what is piped in\n"))
    assert run(["run", "", "Say it:"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    deadline = time.monotonic() + 20
    while is_alive(int(note.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_does_not_start_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "serve_command", lambda *_: [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert run(["run", "", "x"]) == 3


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, []),
        ({"max_num_seqs": 4, "dtype": "float32"}, ["--max-num-seqs=4", "--dtype=float32"]),
        ({"spare": False, "deterministic": True}, ["--no-spare", "--deterministic"]),
        ({"lora_modules": ("a=/x", "b=/y"), "revision": None}, ["--lora-modules=a=/x", "--lora-modules=b=/y"]),
        ({"served_model_name": ["-strange"]}, ["--served-model-name=-strange"]),
    ],
)
def test_the_server_gets_the_options(
    options: dict[str, object], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = serve_command("org/name", "http://127.0.0.1:81", options)
    assert made[:4] == [sys.executable, "-m", "quire", "serve"]
    assert made[4:] == ["org/name", "--host=127.0.0.1", "--port=81", *flags]
    assert run(["serve", "--show-config", *made[4:]]) == 0
    assert capsys.readouterr().out.count("(flag)") == 3 + len(flags) - (len(flags) == 2 and "lora_modules" in options)


def test_the_bundled_model_stands_in_for_the_assistant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(model: str, revision: str | None) -> Path:
        raise CheckpointError(f"{model} cannot be had:\n no network")

    monkeypatch.setattr("quire.engine.checkpoint.find_model", offline)
    assert fetch("smollm2", None) == ""
    assert capsys.readouterr().err == "quire: smollm2 cannot be had: no network; the bundled model answers instead\n"
    with pytest.raises(CheckpointError):
        fetch("org/name", None)


@pytest.mark.parametrize(
    ("prompt", "piped", "whole"),
    [("a", "", "a"), (None, " b\nc\n", "b\nc"), ("a:", "b", "a:\nb"), (None, " \n", None), ("", "", None)],
)
def test_the_prompt(prompt: str | None, piped: str, whole: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    if whole is None:
        with pytest.raises(ConfigError, match="there is no prompt"):
            whole_prompt(prompt)
    else:
        assert whole_prompt(prompt) == whole


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["run", "", "x", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["run", "", "x", "--port", "99999"], 2, "port is 99999"),
        (["run", "", "x", "--disk-cache", "/proc/quire"], 2, "disk_cache is '/proc/quire'"),
        (["run", "./none", "x"], 3, "./none is neither a folder nor a GGUF file"),
        (["run", "a b", "x"], 3, "a b is not a folder"),
    ],
)
def test_wrong_options_start_nothing(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == status
    assert said in capsys.readouterr().err
