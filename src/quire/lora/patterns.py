"""Regular expressions of adapter folders. They come from strangers, so none may take long on the name of a module."""

import re
from collections.abc import Callable

MAX_LENGTH = 2000
MAX_REPEATS = 5
"""Parts of an expression that may match more or less. Each one can multiply the time of a failing match by the length
of the name."""


def check_pattern(pattern: str, refusal: Callable[[str], Exception]) -> None:
    """Raise `refusal`, called with what is expected, for an expression that is none or that could run for ages.

    The time of a match explodes where a group is repeated that matches the same text in several ways, as in (a+)+ or
    (a|a)*. So no group may be repeated, and no group referred to.
    """
    if len(pattern) > MAX_LENGTH:
        raise refusal(f"has at most {MAX_LENGTH} characters")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise refusal(f"is valid; this one is not: {error}") from None
    if re.search(r"\\[1-9]|\(\?P=|\(\?\(", pattern):
        raise refusal("refers to no group")
    # What stands for one character, then what may repeat it.
    pieces = re.findall(r"(\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)([*+]|\{\d*,\d*\})?", pattern, re.DOTALL)
    if any(piece == ")" and repeat for piece, repeat in pieces):
        raise refusal("repeats no group")
    if sum(bool(repeat) for _, repeat in pieces) > MAX_REPEATS:
        raise refusal(f"has at most {MAX_REPEATS} repeats")
