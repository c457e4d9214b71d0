"""Values of arguments that a model writes as plain text or as Python: from their spelling to JSON, by the schema."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

MAX_PYTHON_CHARS = 2**16
"""Longer Python literals are kept as texts: Python's parser takes too much memory for them."""
_TYPES = {dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_MAX_REFERENCES = 32


def property_schema(schema: Mapping[str, Any], key: str, root: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The schema of an object's member, references into `root` followed; empty if there is none. `root` is by default
    `schema`, as for an argument."""
    root = schema if root is None else root
    properties = resolve(schema, root).get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return resolve(found, root) if isinstance(found, Mapping) else {}


def resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that `schema` refers to within `root`; itself if it refers to nothing there."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        found: Any = root
        for part in reference[2:].split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            return schema
        schema = found
    return {}


def json_types(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The JSON types that a value may have; empty if the schema does not say."""
    schema = resolve(schema, root)
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, Sequence):
        return {name for name in kind if isinstance(name, str)}
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return {_TYPES.get(type(value), "string") for value in values}
    for name in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(name)
        if isinstance(branches, list) and depth < _MAX_REFERENCES:
            found = [json_types(branch, root, depth + 1) for branch in branches if isinstance(branch, Mapping)]
            if all(found):
                return set().union(*found)
    return set()


def is_text(schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """True if every value is a text, so that its spelling is its value."""
    return json_types(schema, root) == {"string"}


def spelled_value(text: str, types: set[str]) -> Any:
    """The value that `text` spells for one of `types`: JSON where it fits, else the text itself."""
    word = text.strip()
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        if word.lower() not in _WORDS:
            return text if "string" in types or not types & {"object", "array"} else python_value(text)
        value = _WORDS[word.lower()]
    kind = _TYPES.get(type(value), "string")
    if not types or kind in types or (kind == "integer" and "number" in types):
        return value
    if kind == "number" and "integer" in types and value == int(value):
        return int(value)
    return text if "string" in types else value


def python_value(text: str) -> Any:
    """The value of a Python literal, in which JSON's words are allowed too; the text itself if it is none."""
    if len(text) > MAX_PYTHON_CHARS:
        return text
    try:
        value = _literal(ast.parse(text.strip(), mode="eval").body)
        json.dumps(value, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text
    return value


def as_json(value: Any) -> str:
    """JSON text of a value."""
    return json.dumps(value, ensure_ascii=False)


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name.lower() in _WORDS:
            return _WORDS[name.lower()]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            names = [_literal(key) for key in keys if key is not None]
            return dict(zip(names, map(_literal, values), strict=True))
    raise ValueError("not a literal")


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
