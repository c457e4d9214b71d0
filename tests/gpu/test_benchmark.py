"""The table of `make bench-gpu`: rows are kept as they come, within the time there is, whatever fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_table import Figure, Measurement, Table, measure_all


def test_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    now, cleaned = [0.0], []
    closed = []

    def quick() -> Iterator[Figure]:
        now[0] += 10
        yield Figure("copy rate", "4 TB/s")
        assert "| copy rate | 4 TB/s |  |  |" in file.read_text()

    def broken() -> Iterator[Figure]:
        yield Figure("first", "1", "2", "3")
        raise ValueError("a | b\nc")

    def slow() -> Iterator[Figure]:
        try:
            for name in ("third", "fourth"):
                now[0] += 50
                yield Figure(name, "5")
        finally:
            closed.append(True)

    file = tmp_path / "folder" / "table.md"
    measurements = [
        Measurement("quick", 5, quick),
        Measurement("broken", 5, broken),
        Measurement("long", 80, slow),
        Measurement("slow", 40, slow),
        Measurement("late", 1, quick),
    ]
    table = Table("a card", file)
    measure_all(measurements, table, 60, clean_up=lambda: cleaned.append(True), clock=lambda: now[0])
    assert file.read_text().splitlines() == [
        "a card",
        "",
        "| figure | measured | target | limit |",
        "|---|---|---|---|",
        "| copy rate | 4 TB/s |  |  |",
        "| first | 1 | 2 | 3 |",
        "| broken | failed: ValueError: a / b c |  |  |",
        "| long | not measured: it takes about 80 s, 50 are left |  |  |",
        "| third | 5 |  |  |",
        "| what is left of slow | not measured: no time is left |  |  |",
        "| late | not measured: it takes about 1 s, 0 are left |  |  |",
    ]
    assert closed == [True]
    assert len(cleaned) == 3


def test_without_a_device_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == "no CUDA device: not measured\n"
