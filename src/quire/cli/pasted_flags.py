"""Flags as vLLM has them, before the parser of commands sees them.

--speculative-config.method ngram is one key of an object. The many options that Quire lacks become one hidden flag,
because hundreds of flags would slow every start.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from quire.errors import ConfigError
from quire.vllm_rare_options import RARE_OPTIONS, SHORT_FLAGS

RARE_FLAG = "--vllm-options"
_RARE_SHORT = {flag: name for name, flag in SHORT_FLAGS.items() if name in RARE_OPTIONS}
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


def gather_rare(arguments: Sequence[str]) -> list[str]:
    """`arguments` with all of `RARE_OPTIONS` in one flag, as a JSON object. Raises `ConfigError` for a flag that lacks
    its value."""
    kept: list[str] = []
    rare: dict[str, Any] = {}
    index = 0
    while index < len(arguments) and arguments[index] != "--":
        flag, equals, value = arguments[index].partition("=")
        index += 1
        name, on = _rare_name(flag)
        if name is None:
            kept.append(arguments[index - 1])
        elif equals:
            rare[name] = _read(value)
        elif RARE_OPTIONS[name].is_switch:
            rare[name] = on
        elif RARE_OPTIONS[name].several:
            end = index
            while end < len(arguments) and not arguments[end].startswith("-"):
                end += 1
            rare[name], index = list(arguments[index:end]), end
        elif index == len(arguments):
            raise ConfigError(f"{flag} needs a value")
        else:
            rare[name], index = _read(arguments[index]), index + 1
    return [*kept, *((RARE_FLAG, json.dumps(rare)) if rare else ()), *arguments[index:]]


def _rare_name(flag: str) -> tuple[str | None, bool]:
    """(the option that `flag` sets, or None; whether it turns a switch on)"""
    if flag in _RARE_SHORT:
        return _RARE_SHORT[flag], True
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    if name in RARE_OPTIONS:
        return name, True
    positive = name.removeprefix("no_")
    return (positive, False) if positive in RARE_OPTIONS and RARE_OPTIONS[positive].is_switch else (None, True)


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
