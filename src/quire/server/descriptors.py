"""Descriptors: how many connections a server keeps open, so that it can still open files and start processes."""

import contextlib
import resource

from quire.errors import ConfigError

WANTED = 65_536
"""The limit of descriptors that the server asks of the system at its start. Many systems begin with 1,024."""
RESERVED = 96
"""Descriptors for the server itself: its engine, a spare and the next one, workers, files of stores and batches."""


LEAST = 64
"""Without so many a server cannot even start its engine."""


def raise_limit() -> None:
    """Raise the limit of descriptors of this process, as far as it may. Raises `ConfigError` for fewer than `LEAST`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < LEAST:
        raise ConfigError(f"this process may open {soft} files (ulimit -n); a server needs {LEAST} or more")


def max_connections() -> int:
    """Connections that leave `RESERVED` descriptors, or half of a limit that is small."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WANTED if soft == resource.RLIM_INFINITY else max(1, soft - min(RESERVED, soft // 2))
