"""`benchmarks.peers` with engines that are scripts: a run that is cut short keeps what it measured."""

import os
import signal
import sys
from argparse import Namespace

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers.engines import EngineRow
from benchmarks.peers.results import Results, write_whole
from benchmarks.peers.worker import Worker, WorkerEnded
from benchmarks.peers.workloads import WorkRequest
from benchmarks.rates import PREFILL, STREAM, STREAMS, rates_of
from quire.engine.checkpoint import bundled_folder

ENGINE = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

words = dict(zip(sys.argv[3::2], sys.argv[4::2]))

def report(**seconds):
    figures = {{"version": "1", "seconds": {{k.replace("_", "-"): v for k, v in seconds.items()}}}}
    Path(words["--report"]).write_text(json.dumps(figures))

report(W5_first_token=0.5)
if words["--engine"] == "llama.cpp-f32":
    sys.exit("no more")
if words["--engine"] == "openvino-int8":
    while len(json.loads(Path({output!r}).read_text())["runs"]["openvino-int8"]) == 0:
        time.sleep(0.001)
    Path({pid!r}).write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(1000)
report(W5_first_token=0.5, W5=1.77)
"""


def test_an_interrupted_run_ends_with_the_table_of_what_it_has(tmp_path, monkeypatch, capsys):
    output, pid = tmp_path / "figures.json", tmp_path / "pid"
    for folder in ("openvino", "llama.cpp"):
        python = tmp_path / folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(ENGINE.format(python=sys.executable, output=str(output), pid=str(pid)))
        python.chmod(0o755)
    models = tmp_path / "models"
    models.mkdir()
    (models / "M160-fp32").symlink_to(bundled_folder())
    for weights in ("openvino-fp32", "openvino-int8", "f32.gguf"):
        (models / f"M160-{weights}").touch()
    rates = {"fp32_gflops": 100.0, "bf16_gflops": 200.0, "int8_gops": 400.0, "read_gb_per_s": 20.0}
    monkeypatch.setattr(peers, "measure_ceilings", lambda: rates)
    monkeypatch.setattr(peers, "LOOK_SECONDS", 0.01)
    command = ["peers", str(tmp_path), "--engines", "openvino,llama.cpp-f32,openvino-int8", "--only", "W5"]
    monkeypatch.setattr(sys, "argv", [*command, "--repeats", "2", "--output", str(output)])
    handlers = {ending: signal.getsignal(ending) for ending in (signal.SIGTERM, signal.SIGHUP)}
    try:
        peers.main()
    finally:
        for ending, handler in handlers.items():
            signal.signal(ending, handler)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)

    table, _, last = capsys.readouterr().out.rpartition("\n\n")
    assert last == f"all figures: {output}\n"
    cells = {row.split(" | ")[0]: row.strip("| ").split(" | ")[1:4] for row in table.splitlines()}
    assert cells["| W5-first-token single stream, no more than that, s"] == ["0.50", "0.50", "0.50"]
    assert cells["| W5 decoding, tokens/s"] == ["100", "–", "–"]
    assert "limit int8" in table

    monkeypatch.setattr(sys, "argv", ["peers", "--table", str(output)])
    peers.main()
    assert capsys.readouterr().out == table + "\n"
    assert Results.load(output).runs["llama.cpp-f32"] == [{"version": "1", "seconds": {"W5-first-token": 0.5}}]


def test_limits_are_those_of_the_best_ceilings_and_all_are_kept(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "M160-fp32").symlink_to(bundled_folder())
    names = ("fp32_gflops", "bf16_gflops", "int8_gops", "read_gb_per_s")
    measured = [dict.fromkeys(names, rate) for rate in (100.0, 200.0, 50.0)]
    options = Namespace(peers=tmp_path, model="M160", only=["W6"], output=tmp_path / "figures.json")
    seconds = []
    for found in (measured[:1], measured[1:2], measured):
        results = Results("", "M160", {})
        for rates in found:
            monkeypatch.setattr(peers, "measure_ceilings", lambda rates=rates: rates)
            peers.add_ceilings(options, results)
        seconds.append(results.limits["limit float32"]["seconds"]["W6"])
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[2] == seconds[1]
    assert Results.load(options.output).ceilings == measured


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    write_whole(file, "old")

    def crash(*_):
        raise OSError("crash before the last step")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="last step"):
        write_whole(file, "new")
    assert file.read_text() == "old"


WORKER = """#!{python}
import json, os, subprocess, sys, time

first = json.loads(sys.stdin.readline())
if first["model"].endswith("unreadable"):
    sys.exit("no such format")
print("worker: 0", flush=True)
burn = "from time import process_time as spent; any(iter(lambda: spent() > {seconds}, True))"
for line in sys.stdin:
    print("a word of the engine")
    for request in json.loads(line):
        subprocess.run([sys.executable, "-c", burn])
    print("worker: 7.5", flush=True)
"""


def test_a_worker_counts_the_time_of_its_children_and_says_why_it_ended(tmp_path):
    python = tmp_path / "peer" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(WORKER.format(python=sys.executable, seconds=0.1))
    python.chmod(0o755)
    row = EngineRow(adapter="", folder="peer", weights="")
    with Worker(row, tmp_path / "model", tmp_path, tmp_path / "log", cpus=[0]) as worker:
        costs = [worker.run([WorkRequest([1], 1)] * count) for count in (1, 4)]
    assert [cost.seconds for cost in costs] == [7.5, 7.5]
    assert costs[0].cpu_seconds >= 0.08
    assert costs[0].cpu_seconds + 0.2 <= costs[1].cpu_seconds
    with pytest.raises(WorkerEnded, match="no such format"):
        Worker(row, tmp_path / "unreadable", tmp_path, tmp_path / "log")


def test_rates_leave_out_what_both_runs_have():
    found = rates_of(lambda prompts, tokens, outputs: 5 + 0.001 * prompts * tokens + 0.02 * outputs)
    assert {name: measure() for name, measure in found.items()} == pytest.approx(
        {STREAM: 50, STREAMS: 800, PREFILL: 2048 / 7.068}
    )
