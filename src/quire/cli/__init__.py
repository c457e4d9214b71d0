"""The `quire` command. One file per subcommand; `options` makes flags from the fields of option classes.

Nothing here imports torch at import time, so that --help and --version answer at once.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress

from quire.cli.streams import describe, drop_unwritten, open_streams


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    A reader that closes the pipe early, such as head, has read enough: that is no error.
    """
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    open_streams()
    try:
        status = _run(given)
        sys.stdout.flush()
    except BrokenPipeError:
        status = 0
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        status = 1
        with suppress(OSError):
            print(f"quire: {describe(error)}", file=sys.stderr)
    drop_unwritten()
    sys.exit(status)


def _run(given: Sequence[str]) -> int:
    if given == ["--version"]:
        from quire import __version__

        print(__version__)
        return 0
    from quire.cli.commands import run

    return run(given)
