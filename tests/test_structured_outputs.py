"""StructuredOutputsParams: one constraint, its limits and its equality."""

from typing import Any

import msgspec
import pytest

from quire import RequestError, SamplingParams, StructuredOutputsParams
from quire.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_CHARS

DEEP: dict[str, Any] = {}
for _ in range(100_000):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "it sets nothing"),
        ({"json_object": False}, "it sets nothing"),
        ({"regex": "a", "choice": ["b"]}, "it sets regex and choice"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": 5}, "regex is 5"),
        ({"regex": "a\ud800"}, "surrogate"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "524,289 characters; at most 524,288"),
        ({"choice": []}, "choice holds 0 texts"),
        ({"choice": "yes"}, "must be a list"),
        ({"choice": ["a", ""]}, "non-empty text"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "choice holds 4097 texts"),
        ({"json": "{"}, "not a JSON schema"),
        ({"json": [1]}, "is an object"),
        ({"json": {"const": float("nan")}}, "not a JSON schema"),
        ({"json": {"const": object()}}, "not a JSON schema"),
        ({"json": DEEP}, "nested too deeply"),
        ({"json": "[" * 10**5}, "nested too deeply"),
        ({"json": {"description": "x" * MAX_GRAMMAR_CHARS}}, "characters; at most"),
        ({"json_object": "yes"}, "must be true or false"),
        ({"regex": "a", "whitespace_pattern": " "}, "are for JSON"),
        ({"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}, "both set"),
    ],
)
def test_an_invalid_constraint_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        StructuredOutputsParams(**fields)
    assert refused.value.param == "structured_outputs"
    with pytest.raises(RequestError, match=r"^guided_x: ") as refused:
        StructuredOutputsParams(**fields, asked_as="guided_x")
    assert refused.value.param == "guided_x"


def test_equal_constraints_compare_equal() -> None:
    as_object = StructuredOutputsParams(json={"type": "object", "é": 1})
    as_text = StructuredOutputsParams(json=' {"type":"object" , "\\u00e9": 1} ')
    assert as_object == as_text == StructuredOutputsParams(json=as_text.json, asked_as="guided_json")
    assert len({as_object, as_text, StructuredOutputsParams(json_object=True)}) == 2
    assert StructuredOutputsParams(choice=["b", "a", "b"]).choice == ("b", "a")  # type: ignore[arg-type]  # as JSON has it


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"a": ["é"]}, "disable_any_whitespace": True},
        {"choice": ("a", "b")},
        {"regex": "a+"},
        {"grammar": 'start: "a"'},
        {"json_object": True, "whitespace_pattern": " "},
    ],
)
def test_a_constraint_survives_msgpack_in_its_params(fields: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_params_accept_no_other_type_as_constraint() -> None:
    with pytest.raises(RequestError, match="must be a StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]  # that is the point
