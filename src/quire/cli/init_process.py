"""Process 1 of a container: it does the duties of an init, and its child does the work.

A system gives its process 1 every process whose parent has died, such as the ranks of an engine that was killed. Only
process 1 can remove them when they end. It also gets no signal that it does not handle. A program that knows nothing of
this fills the table of processes, and cannot be stopped before it handles signals.
"""

import os
import signal
from typing import NoReturn

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def leave_process_1() -> None:
    """Return in a child if this is process 1, which stays here and ends as the child does. Else do nothing."""
    if os.getpid() != 1:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # a signal that comes now waits for its handler
    child = os.fork()
    if child:
        _be_init(child)
    os.setsid()  # Ctrl-C of a terminal then comes once: from process 1
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    if os.environ.get("LISTEN_PID") == "1":  # the sockets of systemd are for the process that serves
        os.environ["LISTEN_PID"] = str(os.getpid())


def _be_init(child: int) -> NoReturn:
    """Pass signals on to `child` and remove every process that ends, until `child` is one of them."""
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
