"""Standard streams that are closed, full, ended or of another encoding: one line and a status, never a stack trace."""

import os
import subprocess
import sys

import pytest

from quire.cli.streams import describe


def shell(line: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of the shell in which `quire` is this command."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    function = f'quire() {{ "{sys.executable}" -m quire "$@"; }}; set -o pipefail; '
    command = ["bash", "-c", function + line]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("quire --version > /dev/full", 1, "quire: cannot read or write: No space left on device\n"),
        ("quire serve --show-config > /dev/full", 1, "quire: cannot read or write: No space left on device\n"),
        ("quire rm --help > /dev/full", 1, "quire: cannot read or write: No space left on device\n"),
        ("quire nothing 2> /dev/full", 2, ""),
        ("quire nothing 2>&-", 2, ""),
        ("quire --version >&- <&-", 0, ""),
        ("quire serve --show-config | true", 0, ""),
        ("printf '\\xff' | quire run", 1, "quire: the input is not utf-8: invalid start byte at byte 0\n"),
        ("PYTHONIOENCODING=ascii quire nöthing", 2, 'quire: Unknown command "n\\xf6thing".'),
    ],
)
def test_a_stream_that_fails_is_one_line(line: str, status: int, said: str) -> None:
    done = shell(line)
    assert done.returncode == status
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == (1 if said else 0)
    assert done.stdout == ""


def test_a_closed_stream_leaves_its_number_to_no_other_file() -> None:
    program = (
        "import os, sys; from quire.cli.streams import open_streams; open_streams(); "
        "print(sys.stdin.read() == '', os.open('/dev/null', os.O_RDONLY) > 2, file=open('/dev/fd/9', 'w'))"
    )
    line = f'exec 9>&1; "{sys.executable}" -c "{program}" 0<&- 1>&- 2>&-'
    assert shell(line).stdout == "True True\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(13, "Permission denied", b"/x/y"), "/x/y: Permission denied"),
        (OSError("no words"), "cannot read or write: no words"),
        (TimeoutError(), "cannot read or write: TimeoutError"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"), "a text cannot be written: 'ascii'"),
    ],
)
def test_a_failure_of_the_system_names_its_file(error: OSError | UnicodeError, said: str) -> None:
    assert describe(error).startswith(said)
