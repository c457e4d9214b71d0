"""Workloads and figures of the benchmarks, and `bench serve` against a scripted engine."""

import json
import statistics
from pathlib import Path

import pytest

from quire.cli.bench_workload import (
    FIRST_TOKEN,
    LAST_TOKEN,
    MEAN_LENGTHS,
    WorkloadOptions,
    make_workload,
    percentile,
    spread_of,
)
from quire.cli.commands import run
from quire.errors import ConfigError
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine


def test_random_lengths() -> None:
    lengths = WorkloadOptions(num_prompts=50, input_len=20, output_len=10, range_ratio=0.5)
    work = make_workload(lengths, max_len=100, seed=3)
    assert {len(prompt) for prompt in work.prompts} <= set(range(10, 31))
    assert set(work.output_lens) <= set(range(5, 16))
    assert all(FIRST_TOKEN <= token <= LAST_TOKEN for prompt in work.prompts for token in prompt)
    assert work == make_workload(lengths, max_len=100, seed=3)


@pytest.mark.parametrize("dataset", MEAN_LENGTHS)
def test_named_lengths_have_their_means(dataset: str) -> None:
    work = make_workload(WorkloadOptions(dataset=dataset, num_prompts=3000), max_len=100_000, seed=0)
    mean_input, mean_output = MEAN_LENGTHS[dataset]
    assert work.num_input_tokens / 3000 == pytest.approx(mean_input, rel=0.1)
    assert statistics.fmean(work.output_lens) == pytest.approx(mean_output, rel=0.1)
    short = make_workload(WorkloadOptions(dataset=dataset, num_prompts=200), max_len=64, seed=0)
    assert max(len(p) + o for p, o in zip(short.prompts, short.output_lens, strict=True)) <= 64


def test_unknown_dataset() -> None:
    with pytest.raises(ConfigError, match="it must be one of random, sharegpt, alpaca"):
        make_workload(WorkloadOptions(dataset="x"), max_len=64, seed=0)


def test_percentiles() -> None:
    assert percentile([1, 2, 3, 4, 5], 50) == 3
    assert percentile([1, 2], 75) == 1.75
    assert percentile([7], 99) == 7
    figures = spread_of("ttft", [0.003, 0.001, 0.002], (50, 99.9))
    assert figures["mean_ttft_ms"] == pytest.approx(2)
    assert figures["p50_ttft_ms"] == figures["median_ttft_ms"] == pytest.approx(2)
    assert "p99.9_ttft_ms" in figures
    assert spread_of("ttft", [], (99,)) == {}


def test_serve_measures_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    engine = ScriptedEngine(delay=0.005, endless=True)
    with RunningServer(engine) as server:
        arguments = ["--base-url", server.url, "--num-prompts", "12", "--input-len", "9", "--output-len", "6"]
        rates = [
            "--request-rate",
            "200",
            "--max-concurrency",
            "4",
            "--percentiles",
            "50",
            "--percentiles",
            "99",
        ]
        assert run(["bench", "serve", *arguments, *rates, "--output-json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_input_tokens"] == 12 * 9
    assert result["total_output_tokens"] == 12 * 6
    assert result["mean_ttft_ms"] >= 5
    assert result["median_itl_ms"] >= 4
    assert result["p99_e2el_ms"] >= result["p50_e2el_ms"] >= 30
    assert result["output_throughput"] == pytest.approx(12 * 6 / result["duration"])
    assert "output_throughput" in capsys.readouterr().out


def test_serve_reports_failures(capsys: pytest.CaptureFixture[str]) -> None:
    with RunningServer(ScriptedEngine(full=True)) as server:
        assert run(["bench", "serve", "--base-url", server.url, "--num-prompts", "3"]) == 1
    assert "3 of 3 requests failed, the first with" in capsys.readouterr().err


def test_startup_measures_fresh_processes_and_their_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python, result = tmp_path / "python", tmp_path / "result.json"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\necho ROMEO\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert run(["bench", "startup", "--num-iters", "2", "--threads", "1", "--output-json", str(result)]) == 0
    generate = "-m quire generate The --max-tokens 1 --ignore-eos --threads=1"
    assert (tmp_path / "log").read_text().splitlines() == ["-c import torch", generate] * 2
    figures = json.loads(result.read_text())
    assert len(figures["first_token_seconds"]) == 2
    assert figures["ratio_to_floor"] > 0
    assert figures["median_read_seconds"] > 0
    assert "ratio_to_floor" in capsys.readouterr().out


def test_startup_of_a_process_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || { echo no weights >&2; exit 3; }\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert run(["bench", "startup", "--num-iters", "1"]) == 1
