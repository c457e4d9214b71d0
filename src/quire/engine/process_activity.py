"""What the system knows of another process: whether it works, and why it ended."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_FAULTS_OF_PROGRESS = 64
"""Pages that a process fills for the first time count in so many: a loop has some now and then."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What a process has done since its start."""

    work: float
    """Seconds of CPU time, plus the MiB that it has read: it grows while the process works."""
    intake: int
    """Grows with bytes read and pages filled: while a process loads, and not while it turns in a loop."""


def activity(pid: int) -> Activity | None:
    """The activity of a process; None if the system does not say."""
    stat = _stat(pid)
    if stat is None:
        return None
    work = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    num_faults, num_read = int(stat[7]) + int(stat[9]), 0
    with suppress(OSError):  # a hardened system hides it
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("rchar:"):
                num_read = int(line.partition(":")[2])
    return Activity(work + num_read / 2**20, num_read // 2**20 + num_faults // _FAULTS_OF_PROGRESS)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal and waits to be continued; False if the system does not say."""
    stat = _stat(pid)
    return stat is not None and stat[0] in "Tt"


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None


def num_oom_kills() -> int:
    """Processes that the system ended because the memory limit of this control group was reached."""
    with suppress(OSError, ValueError, StopIteration, IndexError):
        group = next(
            line.partition("::")[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        for line in Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def describe_exit(code: int, *, out_of_memory: bool) -> str:
    """Why a process ended, in words: `code` is its exit code, or minus the number of a signal."""
    if code >= 0:
        return f"it ended with exit code {code}; the server's output says why"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if out_of_memory:
        return f"the system ended it ({name}): the memory limit was reached"
    return f"it was ended by {name}"
