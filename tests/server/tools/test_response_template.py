"""Rows from a tokenizer's response template, against transformers' own parser of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire.engine.chat_template import ChatTemplate
from quire.server.tools.detect import find_format
from quire.server.tools.reader import ReadingOptions, ReplyReader
from tests.server.tools.reading import content, read_pieces, use

JSON_CALLS: dict[str, Any] = {
    "version": 1,
    "start_anchor": "<assistant>",
    "fields": {
        "thinking": {"open": "<ponder>", "close": "</ponder>"},
        "tool_calls": {
            "open": "<invoke>",
            "close": "</invoke>",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{content.fn}", "arguments": "{content.kwargs}"},
            },
        },
        "content": {"close": "<eot>"},
    },
}
PYTHON_CALLS: dict[str, Any] = {
    "start_anchor": "<assistant>",
    "fields": {"tool_calls": {"open": "<calls>", "close": "</calls>", "content": "python-call-list"}, "content": {}},
}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (JSON_CALLS, '<ponder>Hm.</ponder>I look.<invoke>{"fn": "weather", "kwargs": {"city": "Paris"}}</invoke>'),
        (JSON_CALLS, '<invoke>{"fn": "now", "kwargs": {}}</invoke><invoke>{"fn": "now", "kwargs": {}}</invoke>'),
        (JSON_CALLS, "<ponder>x</ponder>Only text."),
        (PYTHON_CALLS, '<calls>[weather(city="Paris"), now()]</calls>'),
    ],
)
def test_an_unseen_family_is_read_as_transformers_reads_it(spec: dict[str, Any], text: str) -> None:
    from transformers.utils.chat_parsing import parse_response

    form = find_format("{{ messages }}{{ tools }}", None, response_template=json.dumps(spec))
    found = content(read_pieces(ReplyReader(ReadingOptions(form, use())), text))
    expected = parse_response(text, spec, prefix="<assistant>")
    assert found[0] == (expected.get("content") or "")
    assert found[1] == (expected.get("thinking") or "")
    calls = [call.get("function", call) for call in expected.get("tool_calls") or []]
    assert [(name, json.loads(arguments)) for name, arguments in found[2]] == [
        (call["name"], call["arguments"]) for call in calls
    ]


def test_marks_of_a_known_family_lead_to_its_row() -> None:
    field = {"open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>", "content": "xml-inline", "x": "<parameter="}
    spec = {"fields": {"tool_calls": field}}
    row = find_format("{{ messages }}", None, response_template=json.dumps(spec)).tools
    assert row is not None
    assert "qwen3_coder" in row.names


def test_it_is_read_from_the_folder(tmp_path: Path) -> None:
    config = {"chat_template": "{{ messages }}", "response_template": PYTHON_CALLS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert json.loads(ChatTemplate.from_folder(tmp_path).response_template) == PYTHON_CALLS
