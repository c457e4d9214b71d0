"""Signals that reach a whole group of processes: Ctrl-C, a terminal that closes, a supervisor that ends a service."""

import signal

GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave_to_parent() -> None:
    """Ignore them: the process that answers clients handles them, and this one ends when its connection does. Else
    requests would lose their engine at the moment in which they may still finish."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
