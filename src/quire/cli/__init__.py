"""The `quire` command. One file per subcommand; `options` makes flags of the fields of the configs.

Nothing here imports torch: what needs it imports it when it runs, so that --help and --version answer at once.
"""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with its status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        from quire import __version__

        print(__version__)
        return
    from quire.cli.commands import run

    status = run(given)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
