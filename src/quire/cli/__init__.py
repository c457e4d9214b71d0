"""The `quire` command. One file per subcommand; `options` makes flags from the fields of option classes.

Nothing here imports torch at import time, so that --help and --version answer at once.
"""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    A reader that closes the pipe early, such as head, has read enough: that is no error.
    """
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    if given == ["--version"]:
        from quire import __version__

        print(__version__)
        return
    from quire.cli.commands import run

    try:
        status = run(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
