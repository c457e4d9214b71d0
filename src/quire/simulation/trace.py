"""Traces: the requests that a server received, as lengths, times and prefixes, in the formats they are published in.

A trace is CSV with a header, or JSON lines; either may be compressed by gzip or xz. A row has the number of tokens of
its prompt and of its output. It may have an arrival time, a `tenant`, a limit (`max_tokens`), and ids for the blocks of
its prompt (`hash_ids`, as in Mooncake's traces): a number per 512 tokens, equal for prompts that are equal up to there.
"""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from quire.errors import ConfigError

HASH_BLOCK_TOKENS = 512
"""Prompt tokens per entry of `hash_ids`."""

MAX_TOKENS = 2**24
"""Most tokens of a prompt or an output: the longest context that a simulation can have."""

TRACES = Path(__file__).parent / "traces"
"""Folder of the traces that come with the package; its README names sources and licences."""
BUNDLED_TRACES = {
    "sharegpt": "sharegpt_papermean.csv.gz",
    "sharegpt-turns": "sharegpt_turns.csv.gz",
    "alpaca": "alpaca_like.csv.gz",
    "mooncake": "mooncake_conversation.jsonl.xz",
    "azure-conv": "azure_conv.csv.gz",
    "azure-code": "azure_code.csv.gz",
}
"""Name → file in `TRACES`."""

_SUFFIXES = ("", ".csv", ".jsonl", ".jsonl.gz", ".csv.gz", ".jsonl.xz", ".csv.xz")
_PROMPT = ("prompt_tokens", "input_length", "ContextTokens", "num_prefill_tokens", "Request tokens")
_OUTPUT = ("output_tokens", "output_length", "GeneratedTokens", "num_decode_tokens", "Response tokens")
_ARRIVAL_UNITS = {"arrival_s": 1.0, "arrived_at": 1.0, "timestamp": 1e-3, "TIMESTAMP": 1.0, "Timestamp": 1.0}
"""Column → seconds per unit. Azure's TIMESTAMP is a date and time."""


class TraceRow(NamedTuple):
    """One request."""

    prompt_tokens: int
    output_tokens: int
    arrival: float | None = None
    """Seconds after the trace's first request."""
    hash_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    """The request's own token limit; None: the limit of the settings."""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """Rows in order of arrival; rows without arrivals in the order of the file."""

    name: str
    rows: list[TraceRow]
    num_skipped: int = 0
    """Rows of the file that were left out because their prompt or their output is empty."""

    @property
    def has_arrivals(self) -> bool:
        return self.rows[0].arrival is not None

    @property
    def has_prefixes(self) -> bool:
        return any(row.hash_ids for row in self.rows)


def find_trace(name: str, folder: str | Path) -> Path:
    """The file of a trace: a path, a file's name in `folder` or its beginning, or a trace of the package.

    Raises `ConfigError`, with the names there are.
    """
    for candidate in (Path(name), *(Path(folder) / f"{name}{suffix}" for suffix in _SUFFIXES)):
        if candidate.is_file():
            return candidate
    known = sorted(path.name for path in Path(folder).glob("*") if path.name.endswith(_SUFFIXES[1:]))
    alike = [file for file in known if file.startswith(name)]
    if len(alike) == 1:
        return Path(folder) / alike[0]
    for own_name, file in BUNDLED_TRACES.items():
        if name in (own_name, file, file.partition(".")[0]):
            return TRACES / file
    there = f"; {folder} holds {', '.join(known)}" if known else ""
    raise ConfigError(
        f"trace is {name!r}, which is no file and none of {', '.join(BUNDLED_TRACES)}{there}. Give a name, a path, or "
        "the folder as traces_dir"
    )


def read_trace(path: str | Path) -> Trace:
    """Read a trace. Raises `ConfigError`, with the line, if the file is not a trace."""
    path = Path(path)
    try:
        text = _decompress(path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    rows: list[TraceRow] = []
    num_skipped = 0
    for line, fields in _json_lines(path, text) if text.lstrip().startswith("{") else _csv_lines(text):
        try:
            row = _row(fields)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"trace {path}, line {line}: {error}") from error
        if row.prompt_tokens and row.output_tokens:
            rows.append(row)
        else:
            num_skipped += 1
    if not rows:
        raise ConfigError(f"trace {path} holds no request with a prompt and an output")
    if len({row.arrival is None for row in rows}) == 2:
        raise ConfigError(f"trace {path} gives an arrival for some rows only; give it for all or for none")
    if rows[0].arrival is not None:
        rows.sort(key=lambda row: row.arrival or 0.0)
        first = rows[0].arrival or 0.0
        rows = [row._replace(arrival=(row.arrival or 0.0) - first) for row in rows]
    return Trace(path.name, rows, num_skipped)


def _decompress(content: bytes) -> bytes:
    if content.startswith(b"\x1f\x8b"):
        return gzip.decompress(content)
    return lzma.decompress(content) if content.startswith(b"\xfd7zXZ\0") else content


def unbounded_hit_percent(rows: Iterable[TraceRow], *, of_tokens: bool = False) -> float | None:
    """Percentage of `hash_ids` blocks, or of the prompt tokens in them, that a prefix cache without evictions would
    hit; None if no row has any."""
    seen: set[int] = set()
    asked = hit = 0
    for row in rows:
        for index, block in enumerate(row.hash_ids):
            size = min(HASH_BLOCK_TOKENS, row.prompt_tokens - index * HASH_BLOCK_TOKENS) if of_tokens else 1
            asked += size
            hit += size if block in seen else 0
        seen.update(row.hash_ids)
    return 100 * hit / asked if asked else None


def _csv_lines(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    for fields in reader:
        yield reader.line_num, fields


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.splitlines(), start=1):
        if content.strip():
            try:
                fields = json.loads(content)
            except ValueError as error:
                raise ConfigError(f"trace {path}, line {line}: {error}") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"trace {path}, line {line}: expected an object")
            yield line, fields


def _row(fields: Mapping[str, Any]) -> TraceRow:
    prompt, output = _count(fields, _PROMPT), _count(fields, _OUTPUT)
    hash_ids = tuple(map(int, fields.get("hash_ids") or ()))
    if hash_ids and len(hash_ids) != -(-prompt // HASH_BLOCK_TOKENS):
        raise ValueError(
            f"{len(hash_ids)} hash_ids for {prompt} prompt tokens; one per {HASH_BLOCK_TOKENS} is expected"
        )
    if any(not 0 <= block < 2**31 for block in hash_ids):
        raise ValueError("a hash id is out of range; they are from 0 to 2^31 - 1")
    column = next((name for name in _ARRIVAL_UNITS if fields.get(name) is not None), None)
    arrival = None if column is None else _seconds(fields[column]) * _ARRIVAL_UNITS[column]
    max_tokens = _count(fields, ("max_tokens",)) if fields.get("max_tokens") else None
    return TraceRow(prompt, output, arrival, hash_ids, max_tokens, str(fields.get("tenant") or ""))


def _count(fields: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        if fields.get(name) is not None:
            value = fields[name]
            count = int(value)
            if not 0 <= count <= MAX_TOKENS or (isinstance(value, float) and count != value):
                raise ValueError(f"{name} is {value}; it must be a whole number from 0 to {MAX_TOKENS}")
            return count
    raise ValueError(f"no column {names[0]} (nor {', '.join(names[1:])})")


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except ValueError:
        return datetime.fromisoformat(value[:26]).timestamp()
    if not abs(seconds) < float("inf"):
        raise ValueError(f"arrival is {value}; it must be finite")
    return seconds
