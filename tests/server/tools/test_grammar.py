"""Grammars of replies: what they force is what the readers read, and follows the schema."""

import json
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from quire.engine.checkpoint import bundled_folder
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.grammar.compiler import GrammarCompiler
from quire.server.tools.events import Message
from quire.server.tools.format_types import Channels, Framed, Messages, ToolFormat
from quire.server.tools.formats import TOOL_FORMATS
from quire.server.tools.grammar import constrain
from quire.server.tools.reader import Opening, ReadingOptions, ReplyFormat, ReplyReader
from quire.server.tools.request import ToolUse, read_tools
from quire.server.tools.thinking_formats import THINKINGS
from quire.structured_outputs import StructuredOutputsParams
from tests.server.tools.reading import marked_tokenizer, read_tokens

EOS = 1
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "unit": {"$ref": "#/$defs/unit"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["x", "</parameter>"]}, "maxItems": 2},
        "note": {"type": ["string", "null"], "maxLength": 3},
    },
    "required": ["unit", "city", "days"],
    "$defs": {"unit": {"enum": ["c", "f"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
FORMATS = [row for row in TOOL_FORMATS if isinstance(row, ToolFormat)]
FORCED = [row for row in TOOL_FORMATS if not isinstance(row, Channels)]
THINK = next(row for row in THINKINGS if "think" in row.names)


@cache
def compiler(*, marked: bool) -> GrammarCompiler:
    if not marked:
        text = (bundled_folder() / "tokenizer.json").read_text()
        return GrammarCompiler(text, vocab_size=1024, eos_token_ids=(EOS,))
    tokenizer = marked_tokenizer()
    return GrammarCompiler(tokenizer._backend.to_str(), vocab_size=tokenizer.vocab_size, eos_token_ids=(EOS,))


@cache
def bundled() -> Tokenizer:
    return Tokenizer.from_folder(bundled_folder())


def use(choice: Any = "required", *, strict: bool = False, parallel: bool = False) -> ToolUse:
    tools = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in TOOLS]  # type: ignore[dict-item]
    found = read_tools(tools, choice, parallel=parallel)
    assert found is not None
    return found


def walk(constraint: StructuredOutputsParams, seed: int, *, marked: bool, most: int = 400) -> str | None:
    """A random text of the grammar; None if it does not end within `most` tokens."""
    tokenizer = marked_tokenizer() if marked else bundled()
    matcher: Any = compiler(marked=marked).compile(constraint).matcher()
    choose, ids = random.Random(seed), list[int]()
    while not matcher.is_stopped() and len(ids) < most:
        step = matcher.compute_ff_tokens()
        if not step:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            allowed = [int(i) for i in np.flatnonzero(bits) if i < tokenizer.vocab_size]
            if EOS in allowed and (choose.random() < 0.3 or allowed == [EOS]):
                break
            # Short tokens: long ones would use up the limits of length with one token.
            short = [i for i in allowed if i != EOS and len(tokenizer.token_bytes(i)) == 1]
            step = [choose.choice(short if short and choose.random() < 0.7 else [i for i in allowed if i != EOS])]
        assert matcher.consume_tokens(step), matcher.get_error()
        ids += step
    return tokenizer.decode(ids, skip_special_tokens=False) if len(ids) < most else None


def check_arguments(call: Any) -> None:
    """The arguments of a call follow the schema."""
    arguments = json.loads(call.arguments)
    if call.name == "now":
        assert arguments == {}
        return
    assert call.name == "weather"
    assert set(PARAMETERS["required"]) <= arguments.keys() <= PARAMETERS["properties"].keys()
    assert isinstance(arguments["city"], str)
    assert len(arguments["city"]) <= 4
    assert arguments["unit"] in ("c", "f")
    assert arguments["days"] in range(1, 10)
    if "code" in arguments:
        assert len(arguments["code"]) == 2
        assert arguments["code"].isupper()
    assert set(arguments.get("tags", [])) <= {"x", "</parameter>"}
    assert isinstance(arguments.get("note"), str | None)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("row", FORCED, ids=lambda row: row.names[0])
def test_forced_calls_are_read_and_follow_the_schema(row: ToolFormat | Messages, marked: bool) -> None:
    tokenizer = marked_tokenizer() if marked else None
    form = ReplyFormat(row, None, tokenizer)
    tools = use(parallel=not {"hermes", "olmo3", "inkling"}.isdisjoint(row.names))
    constraint = constrain(form, tools, None)
    assert constraint is not None
    names = set()
    for seed in range(4):
        text = walk(constraint, seed, marked=marked)
        if text is not None:
            found = read(form, tools, text, marked=marked)
            assert (found.text, found.reasoning) == ("", "")
            assert found.tool_calls
            for call in found.tool_calls:
                check_arguments(call)
                names.add(call.name)
    assert names


def read(form: ReplyFormat, tools: ToolUse, text: str, *, marked: bool, opening: Opening = Opening.FREE) -> Message:
    made = ReplyReader(ReadingOptions(form, tools, opening=opening))
    if marked:
        return read_tokens(made, text)
    found = Message()
    for event in made.read(text, [], finished=True):
        found.add(event)
    return found


def test_a_named_choice_is_one_call_of_that_tool() -> None:
    row = next(row for row in FORMATS if "hermes" in row.names)
    tools = use({"type": "function", "function": {"name": "weather"}})
    constraint = constrain(ReplyFormat(row, None, None), tools, None)
    assert constraint is not None
    text = walk(constraint, 1, marked=False)
    assert text is not None
    found = read(ReplyFormat(row, None, None), tools, text, marked=False)
    assert [call.name for call in found.tool_calls] == ["weather"]
    assert text.startswith("<tool_call>\n")


def accepts(constraint: StructuredOutputsParams, text: str, *, marked: bool = True) -> bool:
    """True if the text may be the whole reply."""
    tokenizer = marked_tokenizer() if marked else bundled()
    matcher: Any = compiler(marked=marked).compile(constraint).matcher()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(matcher.consume_tokens(ids) and matcher.is_accepting())


CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("marked", [False, True])
def test_reasoning_comes_before_a_forced_call(marked: bool) -> None:
    row = next(row for row in FORMATS if "hermes" in row.names)
    form = ReplyFormat(row, THINK, marked_tokenizer() if marked else None)
    opened = constrain(form, use(), None, opening=Opening.OPEN)
    free = constrain(form, use(), None)
    assert opened is not None
    assert free is not None
    assert accepts(opened, f"so é\n</think>\n\n{CALL}", marked=marked)
    assert not accepts(opened, CALL, marked=marked)
    assert accepts(free, CALL, marked=marked)
    assert accepts(free, f"<think>x</think>{CALL}", marked=marked)
    assert not accepts(free, f"x {CALL}", marked=marked)


@pytest.mark.parametrize("marked", [False, True])
def test_strict_tools_bind_the_calls_of_a_free_reply(marked: bool) -> None:
    row = next(row for row in FORMATS if "hermes" in row.names)
    form = ReplyFormat(row, None, marked_tokenizer() if marked else None)
    assert constrain(form, use("auto"), None) is None
    constraint = constrain(form, use("auto", strict=True), None)
    assert constraint is not None
    for text in ("Hello.", CALL, f"a {CALL} b", "", "1 < 2"):
        assert accepts(constraint, text, marked=marked), text
    wrong = CALL.replace("{}", '{"a": 1}')
    for text in (wrong, "<tool_call>x", f"a {CALL}{wrong}"):
        assert not accepts(constraint, text, marked=marked), text


def test_a_constraint_on_the_text_leaves_room_for_calls_and_reasoning() -> None:
    row = next(row for row in FORMATS if "hermes" in row.names)
    form = ReplyFormat(row, THINK, marked_tokenizer())
    wanted = StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "integer"}}})
    both = constrain(form, use("auto"), wanted)
    alone = constrain(form, None, wanted, opening=Opening.OPEN)
    assert both is not None
    assert alone is not None
    for text in ('{"a": 1}', CALL, f"<think>x</think>\n{CALL}", '<think>x</think>{"a": 1}'):
        assert accepts(both, text), text
    for text in ("Hello", '{"b": 1}', f'{{"a": 1}}{CALL}'):
        assert not accepts(both, text), text
    assert accepts(alone, 'x</think>\n\n{"a": 1}')
    assert not accepts(alone, '{"a": 1}')
    assert constrain(ReplyFormat(row, None, None), None, wanted) is wanted


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thinking_budget_counts_tokens(budget: int) -> None:
    tokenizer = marked_tokenizer()
    form = ReplyFormat(None, THINK, tokenizer)
    close = next(i for i, text in tokenizer.added_tokens.items() if text == "</think>")
    constraint = constrain(form, None, None, opening=Opening.OPEN, thinking_budget=budget)
    assert constraint is not None
    matcher: Any = compiler(marked=True).compile(constraint).matcher()
    words = tokenizer.encode("To be, or not to be, that is the question", add_special_tokens=False)
    assert matcher.consume_tokens(words[:budget])
    assert matcher.validate_tokens([words[budget]]) == 0
    assert matcher.consume_tokens([close, *words])
    assert matcher.is_accepting()


def test_a_budget_needs_reasoning_that_ends_with_a_token() -> None:
    for thinking, tokenizer in ((None, marked_tokenizer()), (THINK, None)):
        with pytest.raises(RequestError, match="thinking_token_budget needs"):
            constrain(ReplyFormat(None, thinking, tokenizer), None, None, opening=Opening.OPEN, thinking_budget=3)
    with pytest.raises(RequestError, match="thinking_token_budget is -1"):
        constrain(ReplyFormat(None, THINK, marked_tokenizer()), None, None, opening=Opening.OPEN, thinking_budget=-1)


def test_channels() -> None:
    row = next(row for row in TOOL_FORMATS if isinstance(row, Channels))
    form = ReplyFormat(row, row, marked_tokenizer())
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    thought = "<|channel|>analysis<|message|>x<|end|><|start|>assistant"
    forced = constrain(form, use(), None)
    assert forced is not None
    assert accepts(forced, call)
    assert accepts(forced, thought + call)
    assert not accepts(forced, "<|channel|>final<|message|>Hello")
    wanted = constrain(form, None, StructuredOutputsParams(choice=("yes",)))
    assert wanted is not None
    assert accepts(wanted, f"{thought}<|channel|>final<|message|>yes")
    assert not accepts(wanted, f"{thought}<|channel|>final<|message|>no")


FRAMES = {
    "muse_glimmer": (
        " to=self<|message|>x<|eom|><|start|>assistant",
        " to=user<|message|>",
        "<|eom|><|start|>assistant",
        ' to=now<|message|><atem:function_calls>\n<atem:invoke name="now">\n</atem:invoke>\n</atem:function_calls>',
    ),
    "inkling": (
        "<|content_thinking|>x<|end_message|><|message_model|>",
        "<|content_text|>",
        "<|end_message|><|message_model|>",
        'now<|content_invoke_tool_json|>{"name": "now", "args": {}}',
    ),
    "kimi_k3": (
        "<|open|>think<|sep|>x<|close|>think<|sep|>",
        "<|open|>response<|sep|>",
        "<|close|>response<|sep|>",
        '<|open|>tools<|sep|><|open|>call tool="now" index="1"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
    ),
}
"""Formats of messages: a thought, the header of a text, what ends a text, and a call."""


@pytest.mark.parametrize("name", FRAMES)
def test_messages(name: str) -> None:
    """Thoughts come first, in the frame of the format; strict calls may follow a text, forced ones stand alone."""
    row = next(row for row in TOOL_FORMATS if name in row.names)
    assert isinstance(row, Framed)
    thought, head, ended, call = FRAMES[name]
    form = ReplyFormat(row, row, marked_tokenizer())
    forced, strict = constrain(form, use(), None), constrain(form, use("auto", strict=True), None)
    wanted = constrain(form, None, StructuredOutputsParams(choice=("yes",)))
    opened = constrain(form, use(), None, opening=Opening.OPEN)
    closed = constrain(form, use("auto", strict=True), None, opening=Opening.CLOSED)
    for constraint, yes, no in (
        (forced, [call, thought + call], [f"{head}Hello", thought]),
        (strict, [call, f"{head}Hello", f"{thought}{head}Hello{ended}{call}"], [f"{head}Hello{ended}{call[:-9]}x"]),
        (wanted, [f"{head}yes", f"{thought}{head}yes"], [f"{head}no", "yes"]),
        (opened, [thought[thought.index("x") :] + call], [call, thought + call]),
        (closed, ["Hello", f"Hello{ended}{call}"], [f"Hello{ended}{call[:-9]}x"]),
    ):
        assert constraint is not None
        assert [accepts(constraint, text) for text in yes] == [True] * len(yes), name
        assert not any(accepts(constraint, text) for text in no), name


def test_a_schema_without_properties_lets_any_argument_through() -> None:
    tools = read_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "required")
    for name in ("hermes", "qwen3_coder", "glm45"):
        row = next(row for row in FORMATS if name in row.names)
        form = ReplyFormat(row, None, None)
        constraint = constrain(form, tools, None)
        assert constraint is not None
        assert tools is not None
        for seed in range(3):
            text = walk(constraint, seed, marked=False, most=200)
            if text is not None:
                for call in read(form, tools, text, marked=False).tool_calls:
                    assert isinstance(json.loads(call.arguments), Mapping)


def test_the_end_of_the_prompt_opens_or_closes_the_reasoning() -> None:
    """Earlier turns count for nothing."""
    for row in THINKINGS:
        form = ReplyFormat(None, row, None)
        thought = f"{row.open}x{row.close}"
        assert form.opening(f"<user>Hi {thought}<assistant>{row.open}\n") is Opening.OPEN
        assert form.opening(f"<user>Hi<assistant>{row.open}\n\n{row.close}\n\n") is Opening.CLOSED
        assert form.opening(f"<user>{row.open}<assistant>") is Opening.FREE
        assert form.opening(f"<user>{row.open}<assistant>So", "So") is Opening.FREE
        assert form.opening(f"<assistant>{row.open}So", f"{row.open}So") is Opening.OPEN
        assert form.opening(f"<assistant>{thought} So", f"{thought} So") is Opening.CLOSED


def test_reasoning_that_the_prompt_has_closed_does_not_come_again() -> None:
    form = ReplyFormat(None, THINK, marked_tokenizer())
    constraint = constrain(form, None, StructuredOutputsParams(choice=("yes",)), opening=Opening.CLOSED)
    assert constraint is not None
    assert accepts(constraint, "yes")
    assert not accepts(constraint, "<think>x</think>yes")
    made = ReplyReader(ReadingOptions(ReplyFormat(None, THINK, None), None, opening=Opening.CLOSED))
    assert "".join(event.text for event in made.read("</think>yes", [], finished=True)) == "yes"  # type: ignore[union-attr]
