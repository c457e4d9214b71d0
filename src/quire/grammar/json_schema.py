"""JSON schemas before they are compiled: closes objects, and removes or rewrites what llguidance does not know.

What is removed constrains nothing: keywords whose value allows everything, and formats that are annotations. What is
rewritten accepts the same values. Everything else stays, and llguidance refuses by name what it cannot enforce.
"""

from collections.abc import Callable, Mapping
from typing import Any

WHITESPACE = " "
"""Whitespace between the tokens of JSON by default: one blank or none. More would let a weak model fill its output."""

_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that hold schemas by name."""
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames", "additionalItems")
_APPLICATORS = frozenset({"allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "dependentSchemas", "not"})
_SAYS = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"})

_ANNOTATIONS = frozenset(
    {"title", "description", "examples", "default", "$comment", "deprecated", "readOnly", "writeOnly"}
)
"""Keywords that describe. Without them a grammar takes half the characters."""
_ENFORCED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
_DAY = (
    r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))|([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERNS = {"date": f"^({_DAY})$", "date-time": f"^({_DAY})T{_TIME}$"}
"""Date formats that allow only days that exist; llguidance's own allow 31 days in every month."""


def prepared(schema: Mapping[str, Any], *, closes: bool) -> dict[str, Any]:
    """The schema as llguidance can compile it; with `closes`, its objects are closed (see `closed`)."""
    result = _each(schema, _without_neutral)
    if closes:
        result = closed(result)
    return dict(_each(result, lambda node: _disjoint(node, result)))


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with objects closed: those that list properties and do not say whether there may be more.

    An object that is only a part of another, as a member of allOf is, stays open: its properties are not all.
    """
    result = _close(schema, part=False, parts=_referenced_parts(schema, part=False), place="#")
    assert isinstance(result, dict)
    return result


def _each(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The schema with `change` applied to it and to all schemas in it, inner ones first."""
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    for key, value in schema.items():
        if key in _NAMES and isinstance(value, Mapping):
            result[key] = {name: _each(child, change) for name, child in value.items()}
        elif key in _LISTS and isinstance(value, list):
            result[key] = [_each(child, change) for child in value]
        elif key in _SINGLE:
            result[key] = [_each(child, change) for child in value] if isinstance(value, list) else _each(value, change)
    return change(result)


# --- keywords that constrain nothing ------------------------------------------------------------------------------


def _without_neutral(node: dict[str, Any]) -> dict[str, Any]:
    """The node without keywords whose value allows everything."""
    idle = "if" not in node or (_allows_all(node.get("then", True)) and _allows_all(node.get("else", True)))
    neutral: dict[str, Callable[[Any], bool]] = {
        "uniqueItems": lambda value: value is False,
        "not": lambda value: value is False,
        "if": lambda value: idle,
        "then": lambda value: idle,
        "else": lambda value: idle,
        "dependentRequired": lambda value: isinstance(value, Mapping) and not any(value.values()),
        "dependentSchemas": lambda value: isinstance(value, Mapping) and all(map(_allows_all, value.values())),
        "propertyNames": lambda value: _allows_all(value) or value == {"type": "string"},
        "unevaluatedProperties": _allows_all,
        "unevaluatedItems": _allows_all,
        "contains": lambda value: node.get("minContains") == 0 and "maxContains" not in node,
        "minContains": lambda value: "contains" not in node or (value == 0 and "maxContains" not in node),
        "maxContains": lambda value: "contains" not in node,
        "format": lambda value: value not in _ENFORCED_FORMATS,
    }
    kept = {
        key: value
        for key, value in node.items()
        if key not in _ANNOTATIONS and not (key in neutral and neutral[key](value))
    }
    if _allows_all(kept.get("contains", False)) and "maxContains" not in kept:
        del kept["contains"]  # some item, whatever it is
        kept["minItems"] = max(kept.get("minItems", 0), kept.pop("minContains", 1))
    pattern = _PATTERNS.get(str(kept.get("format")))
    if pattern is not None:
        del kept["format"]
        if "pattern" in kept:
            kept["allOf"] = [*kept.get("allOf", []), {"pattern": pattern}]
        else:
            kept["pattern"] = pattern
    return kept


def _allows_all(schema: Any) -> bool:
    return schema is True or schema == {}


# --- oneOf --------------------------------------------------------------------------------------------------------


def _disjoint(node: dict[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """The node with anyOf in place of oneOf if no value satisfies two branches."""
    branches = node.get("oneOf")
    if not isinstance(branches, list) or "anyOf" in node:
        return node
    shown = [_followed(branch, root) for branch in branches]
    pairs = ((a, b) for index, a in enumerate(shown) for b in shown[index + 1 :])
    if not all(_exclude_each_other(a, b, root) for a, b in pairs):
        return node
    return {("anyOf" if key == "oneOf" else key): value for key, value in node.items() if key != "discriminator"}


def _exclude_each_other(a: Mapping[str, Any], b: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """True if it is certain that no value satisfies both."""
    types_a, types_b = _types(a), _types(b)
    if types_a and types_b and not types_a & types_b and not {"integer", "number"} <= types_a | types_b:
        return True
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None:
        return not any(value in values_b for value in values_a)
    if types_a != {"object"} or types_b != {"object"}:
        return False
    props_a, props_b = a.get("properties", {}), b.get("properties", {})
    needed_a, needed_b = set(a.get("required", [])), set(b.get("required", []))
    if (a.get("additionalProperties") is False and needed_b - props_a.keys()) or (
        b.get("additionalProperties") is False and needed_a - props_b.keys()
    ):
        return True
    return any(
        name in props_a
        and name in props_b
        and _exclude_each_other(_followed(props_a[name], root), _followed(props_b[name], root), root)
        for name in needed_a & needed_b
    )


def _followed(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a local reference leads to; empty where nothing is known."""
    for _ in range(8):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str) or len(schema.keys() - {"title", "description"}) > 1:
            return schema
        found: Any = root
        for part in reference.removeprefix("#").strip("/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        schema = found
    return {}


def _types(schema: Mapping[str, Any]) -> set[str]:
    kind = schema.get("type")
    return {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


# --- closed objects -----------------------------------------------------------------------------------------------


def _close(schema: Any, *, part: bool, parts: set[str], place: str) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    composed = part or len(_APPLICATORS & schema.keys()) > (0 if "properties" in schema else 1)
    for key, value in schema.items():
        if key in _NAMES and isinstance(value, Mapping):
            places = {name: f"{place}/{key}/{name}" for name in value}
            result[key] = {
                name: _close(child, part=places[name] in parts, parts=parts, place=places[name])
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
    """True for an object that lists every required property and does not say whether there may be more."""
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
