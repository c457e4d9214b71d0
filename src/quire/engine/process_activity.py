"""What the system knows of another process: whether it works, and why it ended."""

import os
import signal
from contextlib import suppress
from pathlib import Path


def work_done(pid: int) -> float | None:
    """Seconds of CPU time that a process has used, plus the MiB that it has read: it grows while the process works.

    None if the system does not say.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    work = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    with suppress(OSError):  # a hardened system hides it
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("rchar:"):
                work += int(line.partition(":")[2]) / 2**20
    return work


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
