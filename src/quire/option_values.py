"""Values of options as text: sizes in bytes, numbers of tokens, objects in JSON, and paths."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

_SIZE_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TOKEN_SUFFIXES = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}


def parse_size(name: str, value: int | str | None) -> int | None:
    """Bytes from an integer or a text such as 512MiB, 4GB or 1.5g. Raises `ConfigError` for anything else."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str):
        text = value.strip().lower().removesuffix("b")
        digits = text.rstrip("kmgti")
        factor = _SIZE_SUFFIXES.get(text[len(digits) :].strip(), 1 if digits == text else None)
        try:
            if factor is not None and (size := int(float(digits) * factor)) > 0:
                return size
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"{name} is {value!r}; give a positive number of bytes, e.g. 4GiB or 500MB")


def parse_tokens(name: str, value: int | str | None) -> int | None:
    """Tokens from an integer or from a text as vLLM reads it: 32k is 32,000, 32K is 32,768. For max_model_len, auto and
    -1 are None. Raises `ConfigError` for a text that is no number."""
    if name == "max_model_len" and value in ("auto", -1, "-1"):
        return None
    if not isinstance(value, str):
        return value
    text = value.strip()
    factor = _TOKEN_SUFFIXES.get(text[-1:], 1)
    try:
        return int(float(text[:-1]) * factor) if factor > 1 else int(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; give a number of tokens, e.g. 32768, 32k or 32K") from None


def read_object(name: str, value: Mapping[str, Any] | str, example: Mapping[str, Any]) -> Mapping[str, Any]:
    """An object that is given as itself or as JSON. Raises `ConfigError` for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name} is {value!r}, which is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; it must be an object such as {dict(example)}")
    return value


def check_keys(name: str, value: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise `ConfigError` for keys that an object may not have."""
    if unknown := value.keys() - known:
        raise ConfigError(f"{name} has unknown {sorted(unknown)}; it may have {', '.join(known)}")


def expand_home(path: str | Path) -> Path:
    """`path` with the user's home folder in the place of ~. Raises `ConfigError` for a user without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path} is in a home folder, and this user has none; set HOME, or give a full path"
        ) from None
