"""The texts of a row of the table of formats: reading them, and changing all of them."""

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from quire.engine.tokenizer import Tokenizer

Row = TypeVar("Row")

_SUFFIXED = re.compile(r"<tool_calls(:\w+)>")
_TAG = re.compile(r"<(/?[a-z_]+)>")


def texts_of(row: object) -> list[str]:
    """All texts of a row, those of its parts included."""
    found: list[str] = []
    for _, value in _marks_of(row):
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, tuple):
            found += [text for text in value if isinstance(text, str)]
        elif is_dataclass(value):
            found += texts_of(value)
    return found


def mapped(row: Any, change: Callable[[str], str]) -> Any:
    """The row with each of its texts changed."""
    changes: dict[str, Any] = {}
    for name, value in _marks_of(row):
        if isinstance(value, str):
            changes[name] = change(value)
        elif isinstance(value, tuple):
            changes[name] = tuple(change(text) for text in value)
        elif is_dataclass(value):
            changes[name] = mapped(value, change)
    return replace(row, **changes)


def suffix_of(template: str, tokenizer: Tokenizer | None) -> str:
    """What a checkpoint adds to the name of every tag, as in <tool_calls:opensource>; empty for most."""
    added = () if tokenizer is None else tokenizer.added_tokens.values()
    found = next((match for text in (*added, template) if (match := _SUFFIXED.search(text))), None)
    return found[1] if found else ""


def with_suffix(row: Row, suffix: str) -> Row:
    """The row whose tags have `suffix` behind their names."""
    if row is None or not suffix:
        return row
    changed: Row = mapped(row, lambda text: _TAG.sub(rf"<\1{suffix}>", text))
    return changed


def _marks_of(row: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(row, f.name)) for f in fields(row) if f.name not in ("names", "in_template", "id_style")]
