"""JSON schemas before compiling: closed objects, keywords that constrain nothing, formats, disjoint oneOf."""

import json
from typing import Any

import pytest

from quire.errors import RequestError
from quire.grammar.json_schema import closed, prepared
from quire.structured_outputs import StructuredOutputsParams
from tests.grammar.test_compiler import bundled, compiler

INTEGER = {"type": "integer"}
OPEN = {"type": "object", "required": ["k"], "additionalProperties": True}


def obj(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def accepts(schema: Any, value: Any, **options: Any) -> bool:
    constraint = StructuredOutputsParams(json=schema, **options)
    matcher: Any = compiler().compile(constraint).matcher()
    text = json.dumps(value, ensure_ascii=False)
    return bool(matcher.consume_tokens(bundled().encode(text, add_special_tokens=False)) and matcher.is_accepting())


@pytest.mark.parametrize(
    "schema",
    [
        obj({"a": INTEGER}),
        {"type": "array", "items": obj({"a": INTEGER})},
        {"$ref": "#/$defs/x", "$defs": {"x": obj({"a": INTEGER})}},
        {"anyOf": [obj({"a": INTEGER}), {"type": "null"}]},
        {"allOf": [obj({"a": INTEGER})]},
    ],
)
def test_objects_hold_what_is_listed(schema: Any) -> None:
    wrap = (lambda value: [value]) if schema.get("type") == "array" else lambda value: value
    assert accepts(schema, wrap({"a": 1}))
    assert not accepts(schema, wrap({"a": 1, "b": 2}))
    assert accepts(schema, wrap({"a": 1, "b": 2}), disable_additional_properties=False)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        obj({"a": INTEGER}, additionalProperties=True),
        obj({"a": INTEGER}, additionalProperties=INTEGER),
        obj({"a": INTEGER}, "b"),
        obj({"a": INTEGER}, minProperties=2),
        {"allOf": [obj({"a": INTEGER}), obj({"b": INTEGER})]},
        {"allOf": [{"$ref": "#/$defs/x"}, obj({"b": INTEGER})], "$defs": {"x": obj({"a": INTEGER})}},
        {**obj({"a": INTEGER}), "anyOf": [obj({"b": INTEGER}, "b")]},
    ],
)
def test_what_may_have_more_stays_open(schema: Any) -> None:
    assert closed(schema) == schema
    if "minProperties" not in schema:  # which llguidance knows only where all properties are required
        assert accepts(schema, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    "keywords",
    [
        {"uniqueItems": False},
        {"not": False},
        {"if": {"type": "string"}},
        {"if": INTEGER, "then": True, "else": {}},
        {"then": {"type": "string"}},
        {"dependentRequired": {}},
        {"dependentRequired": {"a": []}},
        {"dependentSchemas": {"a": True}},
        {"propertyNames": {"type": "string"}},
        {"propertyNames": True},
        {"unevaluatedProperties": True},
        {"unevaluatedItems": {}},
        {"contains": INTEGER, "minContains": 0},
        {"minContains": 3},
        {"format": "int32"},
        {"format": "x-our-own"},
        {"title": "x", "description": "y", "examples": [1], "deprecated": True, "$comment": "z", "default": 3},
    ],
)
def test_keywords_that_constrain_nothing_are_accepted(keywords: dict[str, Any]) -> None:
    assert accepts(keywords, 3)
    assert accepts({"type": "array", **keywords}, [3, 3])
    assert accepts({"properties": {"p": keywords}, **keywords}, {"p": 3})


@pytest.mark.parametrize("keywords", [{"uniqueItems": True}, {"not": {}}, {"if": INTEGER, "then": {"minimum": 3}}])
def test_keywords_that_cannot_be_enforced_are_refused_by_name(keywords: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f'keywords .*"{next(iter(keywords))}".* cannot be enforced'):
        accepts(keywords, 3)


def test_contains_anything_means_some_item() -> None:
    assert accepts({"type": "array", "contains": {}}, [3])
    assert not accepts({"type": "array", "contains": True, "minContains": 2}, [3])


@pytest.mark.parametrize("form", ["password", "path", "binary", "byte", "file-path", "color"])
def test_formats_that_are_annotations_allow_every_text(form: str) -> None:
    assert accepts({"type": "string", "format": form}, "any é /text")


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (
            "date",
            ["2024-02-29", "2000-02-29", "2023-12-31", "2023-04-30"],
            ["2023-02-29", "1900-02-29", "2023-04-31", "2023-13-01", "2023-00-10", "23-1-1"],
        ),
        (
            "date-time",
            ["2024-02-29T23:59:59Z", "2024-01-01T00:00:00.25+01:00"],
            ["2023-02-29T00:00:00Z", "2024-01-01T24:00:00Z", "2024-01-01"],
        ),
        ("time", ["12:30:00Z"], ["25:00:00Z"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    ],
)
def test_formats_that_are_enforced(form: str, good: list[str], bad: list[str]) -> None:
    for schema in ({"type": "string", "format": form}, obj({"a": {"type": "string", "format": form}}, "a")):
        wrap = (lambda text: {"a": text}) if "properties" in schema else lambda text: text
        assert all(accepts(schema, wrap(text)) for text in good)
        assert not any(accepts(schema, wrap(text)) for text in bad)
    assert not accepts({"type": "string", "format": "date", "pattern": "^2024"}, "2023-01-01")


@pytest.mark.parametrize(
    ("branches", "good", "bad"),
    [
        ([{"type": "string"}, INTEGER], ["x", 1], [None]),
        (
            [obj({"k": {"const": "a"}}, "k"), obj({"k": {"const": "b"}, "n": INTEGER}, "k")],
            [{"k": "a"}, {"k": "b", "n": 1}],
            [{"k": "c"}],
        ),
        ([obj({"a": INTEGER}, "a"), obj({"b": INTEGER}, "b")], [{"a": 1}, {"b": 1}], [{"a": 1, "b": 1}]),
        ([{"$ref": "#/$defs/x"}, {"type": "null"}], [{"k": "a"}, None], [{}]),
        (
            [OPEN | {"properties": {"k": {"enum": [1, 2]}}}, OPEN | {"properties": {"k": {"const": 3}}}],
            [{"k": 1}, {"k": 3, "z": 1}],
            [{"k": 4}],
        ),
    ],
)
def test_disjoint_one_of(branches: list[Any], good: list[Any], bad: list[Any]) -> None:
    definitions = {"x": obj({"k": {"const": "a"}}, "k")}
    schema = {"oneOf": branches, "discriminator": {"propertyName": "k"}, "$defs": definitions}
    assert "anyOf" in prepared(schema, closes=True)
    for inner in (schema, {**obj({"p": {"oneOf": branches}}, "p"), "$defs": schema["$defs"]}):
        wrap = (lambda value: {"p": value}) if "properties" in inner else lambda value: value
        assert all(accepts(inner, wrap(value)) for value in good)
        assert not any(accepts(inner, wrap(value)) for value in bad)


def test_one_of_that_overlaps_is_not_loosened() -> None:
    schema = {"oneOf": [{"type": "number"}, INTEGER]}
    assert "oneOf" in prepared(schema, closes=True)
