"""`quire completion`: the completion script of a shell."""

import re
from typing import Literal

_WITHOUT_VALUES = re.compile(r"(^ +'\d+:(?:[^':\\]|\\.|'\\'')*|\]:[\w-]+)(' \\)$", re.MULTILINE)
"""An argument or the end of an option in zsh's script whose values are not known."""


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print the completion of this command for a shell.

    Parameters
    ----------
    shell
        The shell.
    """
    from quire.cli.commands import make_app

    script = make_app().generate_completion(shell=shell)
    # A value that is not known may be a file, such as a model's folder. fish assumes it by itself.
    if shell == "bash":
        script = script.replace("complete -F ", "complete -o default -F ")
    elif shell == "zsh":
        script = _WITHOUT_VALUES.sub(r"\1:_files\2", script)
    print(script)
