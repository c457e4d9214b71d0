"""Watchdog: which processes are overdue, by time, by progress, and by the CPU time that they got."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from quire import EngineConfig
from quire.engine.checkpoint import find_model
from quire.engine.memory_plan import plan_memory
from quire.engine.process_activity import activity
from quire.engine.watchdog import LOOK_SECONDS, Watchdog, step_allowance, step_limit
from quire.model_config import ModelConfig


def seconds_until_overdue(work: Callable[[float], float | None], limit: float, allowance: float = 0.0) -> float:
    """When a process that does not advance is overdue; `work` by time."""
    dog, now = Watchdog(), 0.0
    while not dog.overdue(limit, allowance) and now < 1000:
        dog.look(now, "still", work(now))
        now += LOOK_SECONDS
    return now - LOOK_SECONDS


@pytest.mark.parametrize(
    ("share", "allowance", "seconds"),
    [
        (0.0, 0.0, 10.0),
        (0.0, 5.0, 10.0),  # an allowance is for work
        (1.0, 0.0, 10.0),
        (2.0, 0.0, 10.0),
        (1.0, 5.0, 15.0),
        (0.1, 0.0, 100.0),  # neighbours have the CPU
        (None, 0.0, 100.0),
    ],
)
def test_a_process_that_spins_is_overdue_when_one_that_sleeps_is(
    share: float | None, allowance: float, seconds: float
) -> None:
    late = seconds_until_overdue(lambda now: None if share is None else share * now, 10.0, allowance)
    assert late == pytest.approx(seconds, abs=2 * LOOK_SECONDS)


def test_progress_and_rest_begin_anew() -> None:
    dog = Watchdog()
    for at in range(400):
        dog.look(at * LOOK_SECONDS, at // 30, 0.0)
        assert not dog.overdue(10.0)
    dog.rest()
    assert dog.stalled == 0.0
    assert step_limit(30.0, 0.1) == 30.0
    assert step_limit(30.0, 4.0) == 80.0
    assert step_limit(0.0, 4.0) == 0.0


def test_large_models_have_longer_for_their_first_step() -> None:
    config = EngineConfig.from_options({"num_blocks": 100})
    plan = plan_memory(config, ModelConfig.from_folder(find_model(config.model, None)))
    assert 0.0 < step_allowance(plan) < 5.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("program", "takes_in"),
    [
        ("while True: pass", False),
        ("while True: sorted(range(1000))", False),
        ("data = []\nwhile True: data.append(bytearray(100000))", True),
        ("import sys\nwhile True: open(sys.executable, 'rb').read(1 << 20)", True),
    ],
)
def test_a_loop_works_and_takes_nothing_in(program: str, takes_in: bool) -> None:
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**30,) * 2)\nprint(flush=True)\n{program}"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            first = last = activity(process.pid)
            assert first is not None
            while last is not None and last.work < first.work + (60 if takes_in else 0.2):
                if takes_in and last.intake > first.intake + 1:
                    break
                time.sleep(0.02)
                last = activity(process.pid)
        finally:
            process.kill()
    assert last is not None
    assert (last.intake > first.intake + 1) == takes_in
