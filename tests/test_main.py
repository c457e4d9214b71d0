"""Ctrl-C before the command runs and after it: no traceback, and a status that says so."""

import os
import signal
import subprocess
import sys

import pytest

_INTERRUPTED = """
import atexit, os, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
if {moment!r} == "exit":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
from quire.__main__ import main
main()
"""


def interrupted(moment: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, with Ctrl-C when the module `moment` is looked for, or at "exit"."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _INTERRUPTED.format(moment=moment), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "moment", ["quire.cli", "quire.cli.streams", "quire.cli.commands", "cyclopts", "quire.cli.plan", "quire.errors"]
)
def test_ctrl_c_while_modules_load(moment: str) -> None:
    done = interrupted(moment, "plan", "--list-devices")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_python_exits() -> None:
    done = interrupted("exit", "--version")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    assert done.stdout


def test_without_ctrl_c() -> None:
    done = interrupted("never", "--version")
    assert (done.returncode, done.stderr) == (0, "")
