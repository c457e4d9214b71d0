"""ReplyReader: replies of every family, cut anyhow; what is no call stays text."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server.tools.events import ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallBegin, ToolCallEnd
from quire.server.tools.format_types import ToolFormat
from quire.server.tools.formats import TOOL_FORMATS
from quire.server.tools.reader import Opening
from tests.server.tools.reading import content, marked_tokenizer, message, read_pieces, read_tokens, reader, use
from tests.server.tools.replies import PARIS, REPLIES

FORMATS = [row.names[0] for row in TOOL_FORMATS]


def pieces(text: str, cuts: list[int]) -> list[str]:
    """The text cut at these places."""
    ends = sorted(cut % (len(text) + 1) for cut in cuts)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize(("tools", "thinking", "text", "expected"), REPLIES)
def test_replies_of_each_family(tools: str, thinking: str | None, text: str, expected: Any) -> None:
    assert content(read_pieces(reader(tools, thinking), [text])) == expected
    assert content(read_pieces(reader(tools, thinking), text)) == expected
    assert content(read_tokens(reader(tools, thinking, tokenizer=marked_tokenizer()), text)) == expected


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(REPLIES), st.text("<>[]{}\"' \n\\tool_calé", max_size=20), st.lists(st.integers(0, 999)))
def test_cutting_changes_nothing(reply: Any, noise: str, cuts: list[int]) -> None:
    tools, thinking, text, _ = reply
    at = cuts[0] % len(text) if cuts else 0
    text = text[:at] + noise + text[at:]
    whole = content(read_pieces(reader(tools, thinking), [text]))
    assert content(read_pieces(reader(tools, thinking), pieces(text, cuts))) == whole


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(["<tool_call>", "{", '"name": ', "[", "ab", " ", "\n", "é", "</"])),
)
def test_text_without_a_call_is_unchanged(tools: str, parts: list[str]) -> None:
    text = "".join(parts)
    assert content(read_pieces(reader(tools, None if tools == "openai" else "think"), text)) == (text, "", [])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BODIES = {
    "hermes": '<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>',
    "llama3_json": '{{"name": "weather", "parameters": {}}}',
    "mistral_v11": "[TOOL_CALLS]weather[ARGS]{}",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(BODIES)), st.dictionaries(st.text(max_size=5), values, max_size=3), st.booleans(), st.data()
)
def test_any_arguments_come_through_unchanged(
    tools: str, arguments: Any, ascii_only: bool, data: st.DataObject
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    text = BODIES[tools].format(written)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert content(read_pieces(reader(tools), pieces(text, cuts))) == ("", "", [("weather", written)])


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20), st.integers(), st.data())
def test_tagged_values_become_json(city: str, days: int, data: st.DataObject) -> None:
    text = (
        f"<tool_call>\n<function=weather>\n<parameter=city>\n{city}\n</parameter>\n"
        f"<parameter=days>\n{days}\n</parameter>\n</function>\n</tool_call>"
    )
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    ((name, arguments),) = content(read_pieces(reader("qwen3_coder"), pieces(text, cuts)))[2]
    assert (name, json.loads(arguments)) == ("weather", {"city": city, "days": days})


def test_events_come_while_the_call_is_written() -> None:
    made = reader("qwen3_coder", "think", opening=Opening.OPEN)
    steps = [
        "Hm",
        "</think>\n",
        "\nHi <tool",
        "_call>\n<function=weather>\n",
        "<parameter=city>\nPa",
        'r"is',
        "\n",
        "</parameter>\n",
    ]
    events = [made.read(step, [0], finished=False) for step in steps]
    assert events[:3] == [[ReasoningDelta("Hm")], [], [TextDelta("Hi")]]
    begin, opening = events[3]
    assert isinstance(begin, ToolCallBegin)
    assert (begin.index, begin.name) == (0, "weather")
    assert opening == ArgumentsDelta(0, "{")
    assert events[4:] == [
        [ArgumentsDelta(0, '"city": "Pa')],
        [ArgumentsDelta(0, 'r\\"is')],
        [],
        [ArgumentsDelta(0, '"')],
    ]
    end = made.read("</function></tool_call>", [0], finished=True)
    assert end == [ArgumentsDelta(0, "}"), ToolCallEnd(0)]
    assert made.num_reasoning_tokens == 1


def test_several_marks_in_one_piece_give_several_events() -> None:
    text = (
        f'a<tool_call>{{"name": "weather", "arguments": {PARIS}}}</tool_call><tool_call>{{"name": "now"}}</tool_call>b'
    )
    kinds = [type(event) for event in reader("hermes").read(text, [0], finished=True)]
    call = [ToolCallBegin, ArgumentsDelta, ToolCallEnd]
    assert kinds == [TextDelta, *call, *call, TextDelta]


def test_tools_are_read_only_where_the_client_gave_some() -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}</tool_call>'
    assert content(read_pieces(reader("hermes", use=None), text)) == (text, "", [])


def test_a_name_written_twice_is_that_of_a_tool_only() -> None:
    text = '<tool_call>{"name": "now.now"}</tool_call><tool_call>{"name": "later.later"}</tool_call>'
    assert content(read_pieces(reader("hermes"), text)) == ("", "", [("now", "{}"), ("later.later", "{}")])


def test_calls_are_not_parallel_where_the_client_wants_one() -> None:
    text = 'a <tool_call>{"name": "now"}</tool_call><tool_call>{"name": "weather"}</tool_call> b'
    assert content(read_pieces(reader("hermes", use=use(parallel=False)), text)) == ("a b", "", [("now", "{}")])


def test_a_mark_that_is_a_token_counts_only_as_that_token() -> None:
    """The same characters from other tokens are text."""
    tokenizer = marked_tokenizer()
    assert "<tool_call>" in tokenizer.added_tokens.values()
    made = reader("hermes", tokenizer=tokenizer)
    spelled = [7] * 11
    text = '<tool_call>{"name": "now"}'
    assert content(read_pieces_with(made, [(text, spelled)])) == (text, "", [])
    mark = next(token_id for token_id, mark in tokenizer.added_tokens.items() if mark == "<tool_call>")
    made = reader("hermes", tokenizer=tokenizer)
    assert content(read_pieces_with(made, [("<tool_", [mark]), ("call>", []), ('{"name": "now"}', spelled)]))[2]


def read_pieces_with(made: Any, steps: list[tuple[str, list[int]]]) -> Any:
    """The message of steps of (text, token ids)."""
    events = [event for text, ids in steps for event in made.read(text, ids, finished=False)]
    return message(events + made.read("", [], finished=True))


def test_special_tokens_that_are_no_marks_are_hidden() -> None:
    tokenizer = marked_tokenizer()
    end = next(token_id for token_id, text in tokenizer.added_tokens.items() if text == "<|end|>")
    steps = [("a", [9]), ("<|e", [end]), ("nd|>b", [9]), ("<|end|>", [9] * 5)]
    assert read_pieces_with(reader("hermes", tokenizer=tokenizer), steps).text == "ab<|end|>"
    shown = reader("hermes", tokenizer=tokenizer, hides_special_tokens=False)
    assert read_pieces_with(shown, steps).text == "a<|end|>b<|end|>"


@pytest.mark.parametrize(
    "row", [row for row in TOOL_FORMATS if isinstance(row, ToolFormat)], ids=lambda row: row.names[0]
)
def test_ids_are_as_the_family_wants_them(row: ToolFormat) -> None:
    for name, thinking, text, (_, _, calls) in REPLIES:
        if name in row.names and calls:
            ids = [call.id for call in read_pieces(reader(name, thinking), text).tool_calls]
            form = {"call": r"call_[0-9a-f]{24}", "nine": "[a-zA-Z0-9]{9}", "header": r"functions\.\w+:\d"}[
                row.id_style
            ]
            assert all(re.fullmatch(form, call_id) for call_id in ids)
