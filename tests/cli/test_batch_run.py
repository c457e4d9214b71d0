"""`quire batch run` on the bundled model: answers, faults of the input, and a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quire.cli.commands import run


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
