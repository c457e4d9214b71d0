"""The `quire` command, also as `python -m quire`: what happens before its modules are loaded and after it has run."""

import signal
import sys


def main() -> None:
    """Run the command line and exit with its status. Ctrl-C ends it without a traceback at any moment."""
    try:
        from quire.cli import main as run

        run()
    except KeyboardInterrupt:  # while modules load; later ones are answered by the command
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would report one that comes while it exits


if __name__ == "__main__":
    main()
