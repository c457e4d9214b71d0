"""Rows from the response template of a tokenizer: how a family that has no row in the table writes its replies.

transformers saves it in tokenizer_config.json: fields of a message, each with the marks around it and a parser for what
stands between. Marks that are literal texts become a row. Patterns do not; they only help to find a row of the table.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from quire.server.tools.format_types import JsonBody, PythonBody, Thinking, ToolFormat

_THINKING_FIELDS = ("thinking", "reasoning_content", "reasoning")


def texts_in(response_template: str) -> str:
    """All texts of a response template (JSON), to look for the marks of known families."""
    return "\n".join(text.replace("\\", "") for text in _texts(_load(response_template)))


def tools_of(response_template: str) -> ToolFormat | None:
    """The format of tool calls in a response template; None if it has none that a row can describe."""
    field = _fields(response_template).get("tool_calls")
    if not isinstance(field, Mapping):
        return None
    opened, closed = _literal(field.get("open")), _literal(field.get("close"))
    if not opened:
        return None
    match field.get("content"):
        case "json":
            keys = dict(_placeholders(field.get("transform")))
            body = JsonBody(name_key=keys.get("name", "name"), arguments_key=keys.get("arguments", "arguments"))
            return ToolFormat(names=("hf",), call=(opened, closed), body=body, between="\n")
        case "python-call-list":
            return ToolFormat(names=("hf",), section=(opened, closed), body=PythonBody())
    return None


def thinking_of(response_template: str) -> Thinking | None:
    """The marks of the reasoning in a response template."""
    fields = _fields(response_template)
    for name in _THINKING_FIELDS:
        field = fields.get(name)
        if isinstance(field, Mapping):
            opened, closed = _literal(field.get("open")), _literal(field.get("close"))
            if opened and closed:
                return Thinking(names=("hf",), open=opened, close=closed)
    return None


def _fields(response_template: str) -> Mapping[str, Any]:
    spec = _load(response_template)
    fields = spec.get("fields") if isinstance(spec, Mapping) else None
    return fields if isinstance(fields, Mapping) else {}


def _load(response_template: str) -> Any:
    return json.loads(response_template) if response_template else {}


def _literal(mark: Any) -> str:
    """A mark that is a text, or the first of several."""
    if isinstance(mark, list) and mark:
        mark = mark[0]
    return mark if isinstance(mark, str) else ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _placeholders(transform: Any) -> Iterator[tuple[str, str]]:
    """(field of a call, key of the written object) for values like {content.key}."""
    if isinstance(transform, Mapping):
        for name, value in transform.items():
            if isinstance(value, str) and value.startswith("{content.") and value.endswith("}"):
                yield name, value[len("{content.") : -1]
            else:
                yield from _placeholders(value)
    elif isinstance(transform, list):
        for value in transform:
            yield from _placeholders(value)
