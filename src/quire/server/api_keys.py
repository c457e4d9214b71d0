"""ApiKey: who holds a key and what it may use. `--api-keys FILE` has a table for each:

[[keys]]
name = "search"              # in messages and metrics; the only field needed besides the key
key = "sk-…"                 # or key_sha256 = "…", so that the file holds no secret
admin = false                # sees /kv and /metrics of all
priority = 0                 # of all its requests; lower goes first
max_concurrency = 8          # requests at once
tokens_per_minute = 100_000  # prompts and answers
queue_share = 0.25           # of --max-queue-size
models = ["small"]           # names that it may use
"""

import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quire.errors import ConfigError

MAX_FILE_BYTES = 2**20
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. A limit of None is no limit."""

    name: str = ""
    """"" for a key of --api-key or --api-key-file, and on a server without keys."""
    digest: bytes = b""
    """SHA-256 of the key."""
    admin: bool = False
    priority: int | None = None
    """None: requests choose theirs."""
    max_concurrency: int | None = None
    tokens_per_minute: int | None = None
    queue_share: float | None = None
    models: tuple[str, ...] | None = None
    """None: all."""

    @property
    def account(self) -> str:
        """The holder as everything kept for it names it."""
        return self.digest.hex()[:16]


class _Field(NamedTuple):
    supported: str
    accepts: Callable[[Any], bool]


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


_FIELDS = {
    "name": _Field(
        "a text of 1 to 64 letters, digits and . _ - @", lambda v: isinstance(v, str) and bool(_NAME.fullmatch(v))
    ),
    "key": _Field("a text that is not empty", lambda v: isinstance(v, str) and bool(v.strip())),
    "key_sha256": _Field("64 hexadecimal digits", lambda v: isinstance(v, str) and bool(_DIGEST.fullmatch(v))),
    "admin": _Field("true or false", lambda v: isinstance(v, bool)),
    "priority": _Field("a whole number from -2147483648 to 2147483646", lambda v: _is_int(v, -(2**31), 2**31 - 2)),
    "max_concurrency": _Field("a whole number from 1 to 1048576", lambda v: _is_int(v, 1, 2**20)),
    "tokens_per_minute": _Field("a whole number from 1 to 1000000000000", lambda v: _is_int(v, 1, 10**12)),
    "queue_share": _Field("a number above 0, at most 1", lambda v: type(v) in (int, float) and 0 < v <= 1),
    "models": _Field(
        "a list of one or more model names",
        lambda v: isinstance(v, list) and bool(v) and all(isinstance(name, str) for name in v),
    ),
}
"""The fields of a table. A priority of 2147483647 is that of batches."""
_SECRETS = ("key", "key_sha256")


def plain_keys(keys: tuple[str, ...]) -> tuple[ApiKey, ...]:
    """The keys of --api-key and --api-key-file. They are the operator's: without limits, and an admin's."""
    return tuple(ApiKey(digest=_digest_of(key), admin=True) for key in dict.fromkeys(keys))


def read_key_lines(file: str) -> tuple[str, ...]:
    """The keys of --api-key-file. Raises `ConfigError` for a file that cannot be read, or that holds no key."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_key_file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file {file} is not UTF-8 text; write one key per line") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file {file} holds no key; write one key per line")
    return keys


def read_keys(file: str) -> tuple[ApiKey, ...]:
    """The keys in `file`. Raises `ConfigError` that names file, table, field and value, and what is supported."""
    path = Path(file)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"api_keys {file} has {path.stat().st_size} bytes; at most {MAX_FILE_BYTES} are read")
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"api_keys {file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"api_keys {file} is not TOML: {' '.join(str(error).split())[:200]}") from None
    for name in found:
        if name != "keys":
            raise ConfigError(f"api_keys {file} holds {name[:80]!r}; supported: a table [[keys]] for each key")
    tables = found.get("keys")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"api_keys {file} holds no keys; supported: a table [[keys]] for each key")
    keys: dict[str, ApiKey] = {}
    for number, table in enumerate(tables, 1):
        where = f"api_keys {file}, table {number}"
        key = _read_table(where, table)
        if key.name in keys:
            raise ConfigError(f"{where}: name is {key.name!r}, as in an earlier table; each key needs its own")
        for other in keys.values():
            if key.digest == other.digest:
                raise ConfigError(f"{where}: the key of {key.name!r} is also that of {other.name!r}")
        keys[key.name] = key
    return tuple(keys.values())


def _read_table(where: str, table: Mapping[str, Any]) -> ApiKey:
    for name, value in table.items():
        if name not in _FIELDS:
            raise ConfigError(f"{where}: {name[:80]} is not a field; supported: {', '.join(_FIELDS)}")
        if not _FIELDS[name].accepts(value):
            shown = _without_secret(value) if name in _SECRETS else repr(value)[:80]
            raise ConfigError(f"{where}: {name} is {shown}; supported: {_FIELDS[name].supported}")
    if "name" not in table:
        raise ConfigError(f"{where}: name is missing; supported: {_FIELDS['name'].supported}")
    if ("key" in table) == ("key_sha256" in table):
        raise ConfigError(f"{where} ({table['name']}): give either key or key_sha256")
    digest = _digest_of(table["key"]) if "key" in table else bytes.fromhex(table["key_sha256"])
    rest = {name: value for name, value in table.items() if name not in _SECRETS}
    rest["models"] = tuple(rest["models"]) if "models" in rest else None
    return ApiKey(digest=digest, **{"priority": 0, **rest})


def _digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode().strip()).digest()


def _without_secret(value: object) -> str:
    return f"a text of {len(value)} characters" if isinstance(value, str) else f"of type {type(value).__name__}"
