"""unfinished: where a result is written under another name, until it is whole."""

import contextlib
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from quire.errors import CheckpointError, ConfigError

_SUFFIX = ".part"


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; what the block left as its `target.name` becomes `target` at the end.

    Whatever ends the block early, an interrupt or a full disk, removes the folder. The next process removes what a
    killed one left. Raises `ConfigError` for a target that exists or lies nowhere, and `CheckpointError` for a disk
    that is full or read-only.
    """
    check_place(target)
    folder = target.parent / f".{target.name}.{os.getpid()}{_SUFFIX}"
    try:
        _remove_abandoned(target)
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a process that died holds none
            with _interrupted_by_term():
                yield folder
            _take_place(folder / target.name, target)
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}; nothing is left of it"
        ) from error


def check_place(target: Path) -> None:
    """Raise `ConfigError` for a target that exists or lies nowhere."""
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists; remove it, or name another place with --output")
    if not target.parent.is_dir():
        raise ConfigError(f"{target} cannot be written: there is no folder {target.parent}")


def _take_place(made: Path, target: Path) -> None:
    """Rename, but never over something that another process made meanwhile."""
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists by now; remove it, or name another place with --output")
    made.rename(target)


def _remove_abandoned(target: Path) -> None:
    for folder in target.parent.glob(f".{target.name}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _interrupted_by_term() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that what was written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
