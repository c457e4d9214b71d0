"""Standard input, output and error as a command finds them: closed, full, a pipe that ended, or not of UTF-8."""

import os
import sys
from io import TextIOWrapper

_STREAMS = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))
"""Name, flags and mode of the descriptors 0, 1 and 2."""


def open_streams() -> None:
    """Make all three streams usable.

    A closed one is /dev/null from then on; otherwise the next file or socket would get its number. A character that the
    terminal's encoding lacks is written as its escape; input of another encoding is an error.
    """
    for descriptor, (name, flags, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            _open_null(descriptor, flags)
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def drop_unwritten() -> None:
    """Write out what standard output and error hold, or drop it where that fails.

    Python flushes both once more at exit, and would report a failure in its own words.
    """
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _open_null(descriptor, os.O_WRONLY)


def describe(error: OSError | UnicodeError) -> str:
    """What the system refused, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"the input is not {error.encoding}: {error.reason} at byte {error.start}"
    if isinstance(error, UnicodeError):
        return f"a text cannot be written: {error}"
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"cannot read or write: {reason}"
    return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {reason}"


def _open_null(descriptor: int, flags: int) -> None:
    null = os.open(os.devnull, flags)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
