"""Process 1 of a container, as a process that its descendants are given to and that takes itself for process 1."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAM = """
import ctypes, os, signal, subprocess, sys, time
from quire.cli.init_process import leave_process_1

if ctypes.CDLL(None).prctl(36, 1):  # PR_SET_CHILD_SUBREAPER: orphans below come to this process, as to process 1
    sys.exit("unsupported")
own_pid, init, os.environ["LISTEN_PID"] = os.getpid, os.getpid(), "1"
os.getpid = lambda: 1 if own_pid() == init else own_pid()
leave_process_1()

def orphans():
    return [pid for pid in open(f"/proc/{init}/task/{init}/children").read().split() if int(pid) != os.getpid()]

def work():
WORK

work()
"""
ORPHANS = """
    for _ in range(20):
        subprocess.run(["sh", "-c", "sleep 0.05 & exit"])
    seen = len(orphans())
    deadline = time.monotonic() + 10
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.01)
    print(seen > 0, len(orphans()), os.environ["LISTEN_PID"] == str(os.getpid()), flush=True)
    sys.exit(7)
"""
SIGNALS = """
    seen = []
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: seen.append(number))
    print("ready", flush=True)
    while len(seen) < 3:
        time.sleep(0.005)
    sys.exit(40 + len(seen))
"""
KILLED = """
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def process(work: str) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-c", PROGRAM.replace("WORK", work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as started:
        yield started


def test_orphans_that_end_are_removed() -> None:
    with process(ORPHANS) as init:
        assert init.stdout is not None
        assert init.stdout.read().split() == ["True", "0", "True"]
    assert init.returncode == 7


def test_signals_are_passed_on() -> None:
    with process(SIGNALS) as init:
        assert init.stdout is not None
        assert init.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            init.send_signal(number)
    assert init.returncode == 43


@pytest.mark.parametrize(("work", "code"), [(KILLED, 128 + signal.SIGKILL), ("    sys.exit(3)\n", 3)])
def test_it_ends_as_its_child(work: str, code: int) -> None:
    with process(work) as init:
        pass
    assert init.returncode == code
