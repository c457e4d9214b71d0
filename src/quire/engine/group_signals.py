"""Signals that reach a whole group of processes: Ctrl-C, a terminal that closes, a supervisor that ends a service."""

import ctypes
import signal
import sys

GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def leave_to_parent() -> None:
    """Ignore them: the process that answers clients handles them, and this one ends when its connection does. Else
    requests would lose their engine at the moment in which they may still finish.

    If this process is stopped when its parent dies, the system lets it go on: it can only end when it runs."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)
