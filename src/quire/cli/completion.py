"""`quire completion`: the completion script of a shell."""

from typing import Literal


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print the completion of this command for a shell.

    Parameters
    ----------
    shell
        The shell.
    """
    from quire.cli.commands import make_app

    print(make_app().generate_completion(shell=shell))
