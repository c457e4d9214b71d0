"""JSON schemas before they are compiled: what clients leave out, and what llguidance does not know."""

from collections.abc import Mapping
from typing import Any

WHITESPACE = " "
"""Whitespace between the tokens of JSON by default: one blank or none. More would let a weak model fill its output."""

_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that hold schemas by name."""
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames", "additionalItems")
_APPLICATORS = frozenset({"allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "dependentSchemas", "not"})
_SAYS = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"})


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with objects closed: those that list properties and do not say whether there may be more.

    An object that is only a part of another, as a member of allOf is, stays open: its properties are not all.
    """
    parts = _referenced_parts(schema, part=False)
    result = _close(schema, part=False, parts=parts, place="#")
    assert isinstance(result, dict)
    return result


def _close(schema: Any, *, part: bool, parts: set[str], place: str) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    composed = part or len(_APPLICATORS & schema.keys()) > (0 if "properties" in schema else 1)
    for key, value in schema.items():
        if key in _NAMES and isinstance(value, Mapping):
            result[key] = {
                name: _close(child, part=f"{place}/{key}/{name}" in parts, parts=parts, place=f"{place}/{key}/{name}")
                for name, child in value.items()
            }
        elif key in _LISTS and isinstance(value, list):
            inner = key != "prefixItems" and (composed or (key == "allOf" and len(value) > 1))
            result[key] = [
                _close(child, part=inner, parts=parts, place=f"{place}/{key}/{index}")
                for index, child in enumerate(value)
            ]
        elif key in _SINGLE:
            inner = key in ("not", "if", "then", "else")
            result[key] = _close(value, part=inner, parts=parts, place=f"{place}/{key}")
        else:
            result[key] = value
    if _is_whole(schema) and not part:
        result["additionalProperties"] = False
    return result


def _is_whole(schema: Mapping[str, Any]) -> bool:
    """True for an object that lists all properties that it needs and says nothing of others."""
    listed, required = schema.get("properties"), schema.get("required") or []
    return (
        isinstance(listed, Mapping)
        and not _SAYS & schema.keys()
        and not _APPLICATORS & schema.keys()
        and all(isinstance(name, str) and name in listed for name in required)
        and not (isinstance(least := schema.get("minProperties"), int) and least > len(listed))
    )


def _referenced_parts(schema: Any, *, part: bool) -> set[str]:
    """Places that are referred to as a part of an object."""
    if isinstance(schema, list):
        return set().union(*(_referenced_parts(item, part=part) for item in schema))
    if not isinstance(schema, Mapping):
        return set()
    found: set[str] = set()
    composed = part or "properties" in schema or len(_APPLICATORS & schema.keys()) > 1
    reference = schema.get("$ref")
    if isinstance(reference, str) and composed:
        found.add(reference)
    for key, value in schema.items():
        inner = key in _APPLICATORS and (composed or (key == "allOf" and isinstance(value, list) and len(value) > 1))
        if key in _NAMES and isinstance(value, Mapping):
            for child in value.values():
                found |= _referenced_parts(child, part=False)
        elif key in (*_LISTS, *_SINGLE):
            found |= _referenced_parts(value, part=inner or key in ("not", "if", "then", "else"))
    return found
