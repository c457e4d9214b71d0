"""Repetitions in regular expressions: how often a text must repeat something at least.

A lexer unrolls nested repetitions. Those that multiply to a large number take seconds where the text reaches them, long
after the grammar was compiled, so they are refused before.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quire.errors import RequestError

MAX_REPETITIONS = 10_000
_PART = re.compile(r"\\.|\[(?:\\.|\[[^\]]*\]|[^\]\\])*\]|\{\s*(\d+)\s*(?:,\s*\d*\s*)?\}|[()]|.", re.DOTALL)
_LARK_EXPRESSION = re.compile(r'"(?:\\.|[^"\\\n])*"|/((?:\\.|[^/\\\n])+)/|//[^\n]*|#[^\n]*')


def check_repetitions(expression: str) -> None:
    """Raise `RequestError` if the expression repeats something more than `MAX_REPETITIONS` times at least."""
    count = least_repetitions(expression)
    if count > MAX_REPETITIONS:
        raise RequestError(
            f"the expression {expression[:60]!r} repeats something at least {count:,} times; at most "
            f"{MAX_REPETITIONS:,} are allowed"
        )


def least_repetitions(expression: str) -> int:
    """The largest product of the least counts of nested repetitions."""
    largest = [1]  # within each open group
    last = 1  # of the part before the position
    for match in _PART.finditer(expression):
        part = match[0]
        if part == "(":
            largest.append(1)
            last = 1
        elif part == ")" and len(largest) > 1:
            last = largest.pop()
            largest[-1] = max(largest[-1], last)
        elif match[1] is not None:
            last *= max(1, int(match[1][:12]))
            largest[-1] = max(largest[-1], last)
        elif part not in ("?", "*", "+"):
            last = 1
    return max(largest)


def expressions_in_lark(grammar: str) -> Iterator[str]:
    """The regular expressions of a Lark grammar."""
    for match in _LARK_EXPRESSION.finditer(grammar):
        if match[1] is not None:
            yield match[1]


def expressions_in_schema(schema: Any) -> Iterator[str]:
    """The patterns of a JSON schema."""
    if isinstance(schema, list):
        for item in schema:
            yield from expressions_in_schema(item)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "pattern" and isinstance(value, str):
                yield value
            elif key == "patternProperties" and isinstance(value, Mapping):
                yield from value
            yield from expressions_in_schema(value)
