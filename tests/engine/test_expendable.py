"""Processes for work that may never end: what happens to them from outside hurts no question."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.engine import expendable
from quire.engine.expendable import CostlyQuestionError, Expendable
from quire.engine.messages import LoadTemplate, Rendered, RenderMessages, decode_from_renderer, encode
from quire.engine.process_activity import is_stopped
from quire.errors import EngineUnavailableError

FROM_OUTSIDE = (
    "killed",
    "crashed",
    "stopped",
    "exits",
    "closes and lives on",
    "garbage",
    "an empty message",
    "a length without end",
    "late",
)
BY_QUESTION = ("out of CPU time", "late and busy", "raises")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Expendable[Rendered]]:
    monkeypatch.setattr(expendable, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("ANSWER", encode(Rendered("right")).hex())
    monkeypatch.setattr(expendable, "_WORKED_SECONDS", 0.1)
    found = Expendable(
        "tests.engine.scripted_worker", "does as told", LoadTemplate("x"), decode_from_renderer, seconds=2.0
    )
    yield found
    found.close()


def question(fault: str, seen: Path, times: int) -> RenderMessages:
    return RenderMessages([], {"do": f"<{fault}|{times}|{seen}>"})


def test_a_fault_from_outside_costs_a_process_and_no_answer(process: Expendable[Rendered], tmp_path: Path) -> None:
    for fault in FROM_OUTSIDE:
        answer = process.ask(question(fault, tmp_path / fault, times=1))
        assert answer.text == "right", fault
        assert (tmp_path / fault).read_text() == "x", f"{fault}: the process met it"


@pytest.mark.parametrize(
    ("fault", "num_processes"), [("crashed", 2), ("garbage", 2), *((each, 1) for each in BY_QUESTION)]
)
def test_a_question_is_blamed_by_evidence(
    process: Expendable[Rendered], tmp_path: Path, fault: str, num_processes: int
) -> None:
    """Two processes in a row that fail are evidence, and so is the time that one has used."""
    with pytest.raises(CostlyQuestionError, match="the process that does as told"):
        process.ask(question(fault, tmp_path / "seen", times=99))
    assert len((tmp_path / "seen").read_text()) == num_processes
    assert process.ask(question("none", tmp_path / "none", times=0)).text == "right"


def test_kills_in_a_row_blame_nobody(process: Expendable[Rendered], tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailableError) as caught:
        process.ask(question("killed", tmp_path / "seen", times=2))
    assert not isinstance(caught.value, CostlyQuestionError)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_idles_is_replaced(
    process: Expendable[Rendered], tmp_path: Path, number: signal.Signals
) -> None:
    harmless = question("none", tmp_path / "none", times=0)
    process.ask(harmless)
    first = process.pid
    assert first is not None
    os.kill(first, number)
    deadline = time.monotonic() + 10
    while number == signal.SIGSTOP and not is_stopped(first) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.ask(harmless).text == "right"
    assert process.pid != first


def test_a_lack_of_descriptors_is_503_and_ends(process: Expendable[Rendered], tmp_path: Path) -> None:
    harmless = question("none", tmp_path / "none", times=0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, limits[1]))
        for _ in range(3):
            with pytest.raises(EngineUnavailableError, match="Too many open files") as caught:
                process.ask(harmless)
            assert not isinstance(caught.value, CostlyQuestionError)
            assert caught.value.status == 503
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == num_open, "a failed start leaves none open"
    assert process.ask(harmless).text == "right"
