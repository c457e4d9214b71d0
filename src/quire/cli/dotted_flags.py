"""Flags with dots, as vLLM has them: --speculative-config.method ngram is one key of an object."""

import json
import re
from collections.abc import Sequence
from typing import Any

from quire.errors import ConfigError

_DOTTED = re.compile(r"(--[a-z][a-z0-9_-]*|-sc|-cc|-ac|-dc)\.([\w.-]+)(?:=(.*))?", re.DOTALL)


def join_dotted(arguments: Sequence[str]) -> list[str]:
    """`arguments` with all keys of one flag in one JSON object, at the end.

    A value is read as JSON, else as text. A key without a value is true. Raises `ConfigError` for a key that is given
    as a value and as an object. What follows -- is left alone.
    """
    kept: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    rest = iter(range(len(arguments)))
    for index in rest:
        if arguments[index] == "--":
            return [*kept, *_flags(objects), *arguments[index:]]
        found = _DOTTED.fullmatch(arguments[index])
        if found is None:
            kept.append(arguments[index])
            continue
        flag, path, value = found.groups()
        if value is None and index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
            value = arguments[next(rest)]
        _put(objects.setdefault(flag, {}), path.split("."), _read(value), flag)
    return [*kept, *_flags(objects)]


def _flags(objects: dict[str, dict[str, Any]]) -> list[str]:
    return [word for flag, given in objects.items() for word in (flag, json.dumps(given))]


def _read(value: str | None) -> Any:
    if value is None:
        return True
    try:
        return json.loads(value)
    except ValueError:
        return {"true": True, "false": False}.get(value.lower(), value)


def _put(target: dict[str, Any], path: list[str], value: Any, flag: str) -> None:
    *above, last = path
    for name in above:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{flag}: {name} is given as a value and as an object; give one of them")
    target[last] = value
