"""`quire batch run` on the bundled model: answers, faults of the input, and a kill in the middle."""

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.cli.commands import run
from quire.server.batches.store import BatchStore


def write_requests(path: Path, count: int, max_tokens: int = 4) -> None:
    body = {"prompt": "ROMEO:", "max_tokens": max_tokens, "ignore_eos": True}
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def custom_ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_requests(requests, 60, max_tokens=40)
    command = [sys.executable, "-m", "quire", "batch", "run", str(requests), str(out), "--max-num-seqs", "4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    log = tmp_path / "out.jsonl.partial" / "batches.sqlite3-wal"
    end = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size > 40_000):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert run(["batch", "run", str(requests), str(out)]) == 0
    assert "going on with an earlier run" in capsys.readouterr().err
    assert custom_ids(out) == [f"r{index}" for index in range(60)]
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no request"),
        ("{}", "line 1"),
        ('{"custom_id":"a","method":"POST","url":"/v1/completions","body":{}}\n{', "line 2"),
        ('{"custom_id":"a","method":"POST","url":"/v1/models","body":{}}', "batches are answered by"),
        ('{"custom_id":"a","method":"POST","url":"/v1/completions","body":[]}', "body is not an object"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_input_is_refused_before_the_model_is_loaded(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    assert run(["batch", "run", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_output_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "in.jsonl"
    write_requests(requests, 1)
    for output, message in ((tmp_path, "is a folder"), (requests, "is the input too")):
        assert run(["batch", "run", str(requests), str(output)]) == 2
        assert message in capsys.readouterr().err
    assert custom_ids(requests) == ["r0"]


@pytest.mark.parametrize("failing", ["shutil.copyfile", "BatchStore.add_file", "BatchStore.add_batch"])
def test_a_full_disk_at_the_start_is_one_line(
    failing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    requests = tmp_path / "in.jsonl"
    write_requests(requests, 1)
    monkeypatch.setattr(f"quire.cli.batch_run.{failing}", full)
    assert run(["batch", "run", str(requests), str(tmp_path / "out.jsonl")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quire:")]
    assert "space" in line
    assert "the same command goes on" in line


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C as at a terminal: what a script starts in the background ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupts")
def test_a_disk_that_fills_and_an_interrupt_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_requests(requests, 60)
    command = ["batch", "run", str(requests), str(out), "--max-num-seqs", "4", "--threads", "1"]
    save, num_saves = BatchStore.add_answers, 0

    def filling(self: BatchStore, *args: Any) -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves == 2:
            raise sqlite3.OperationalError("database or disk is full")
        if num_saves == 3:
            os.kill(os.getpid(), signal.SIGINT)
        save(self, *args)

    monkeypatch.setattr(BatchStore, "add_answers", filling)
    monkeypatch.setattr("quire.server.store_faults._FIRST_PAUSE", 0.01)
    assert run(command) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    move = shutil.move
    monkeypatch.setattr("quire.cli.batch_run.shutil.move", lambda source, target: move(source, tmp_path / "no" / "x"))
    assert run(command) == 1  # all is answered, and the place of the output is gone
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr("quire.cli.batch_run.shutil.move", move)
    assert run(command) == 0
    assert custom_ids(out) == [f"r{index}" for index in range(60)]
