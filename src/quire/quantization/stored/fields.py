"""Fields: an object of a checkpoint's config, read key by key; every refusal names file, key, value and limit."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError

_NUM_SHOWN = 120
_MAX_PATTERN = 500
_MAX_REPEATS = 5
"""Repeats of a pattern: matching takes time to the power of their number."""
LARGEST_GROUP = 2**20
"""Inputs. No layer is as wide."""


class Fields:
    """The object `name` of a file."""

    def __init__(self, path: Path, name: str, values: Any) -> None:
        self.path = path
        self.name = name
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: {name} is {shown(values)}; supported: an object")
        self.values: dict[str, Any] = values

    def inside(self, key: str) -> "Fields":
        """The object of a key."""
        return Fields(self.path, f"{self.name}.{key}", self.values.get(key))

    def optional(self, key: str) -> "Fields | None":
        """The object of a key, None where the key is missing or null."""
        return None if self.values.get(key) is None else self.inside(key)

    def integer(self, key: str, supported: Sequence[int], default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int or value not in supported:
            raise self.refusal(key, ", ".join(map(str, supported)))
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "true or false")
        return value

    def choice(self, key: str, supported: Sequence[str], default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str) or value not in supported:
            raise self.refusal(key, ", ".join(supported))
        return value

    def group_size(self, key: str = "group_size", *, default: int | None = None) -> int | None:
        """Inputs that share a scale; None for all, which -1 stands for."""
        value = self._value(key, default)
        if value == -1 and type(value) is int:
            return None
        if type(value) is not int or not 8 <= value <= LARGEST_GROUP or value % 8:
            raise self.refusal(key, "-1 for all inputs, or a multiple of 8 from 8 on")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty where the key is missing or null."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.refusal(key, "a list of texts")
        return tuple(value)

    def pattern(self, key: str, pattern: str) -> str:
        """A regular expression of this file, checked: it compiles, and no name can make it slow."""
        try:
            re.compile(pattern)
            valid = len(pattern) <= _MAX_PATTERN
        except (re.error, OverflowError, RecursionError):
            valid = False
        simple = not re.search(r"\)[*+{]", pattern) and len(re.findall(r"(?<!\\)[*+{]", pattern)) <= _MAX_REPEATS
        if not valid or not simple:
            raise CheckpointError(
                f"{self.path}: {self.name}.{key} has the pattern {shown(pattern)}; supported: regular expressions of "
                f"up to {_MAX_PATTERN} characters with up to {_MAX_REPEATS} repeats and no repeated groups"
            )
        return pattern

    def refusal(self, key: str, supported: str) -> CheckpointError:
        """The error for the value of a key that is not supported."""
        return CheckpointError(
            f"{self.path}: {self.name}.{key} is {shown(self.values.get(key))}; supported: {supported}"
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def shown(value: object) -> str:
    """A value of a JSON file, cut to what a message has room for."""
    text = "missing" if value is None else json.dumps(value, default=str)
    return text if len(text) <= _NUM_SHOWN else f"{text[:_NUM_SHOWN]} …"
