"""Reading scripted replies: cut into pieces of characters, or into the tokens of a vocabulary that has the marks."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import tokenizers

from quire.engine.checkpoint import bundled_folder
from quire.engine.detokenizer import Detokenizer
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams
from quire.server.tools.events import Event, Message, TextDelta, ToolCallBegin, ToolCallEnd
from quire.server.tools.format_types import Framed, Thinking, ToolFormat
from quire.server.tools.formats import TOOL_FORMATS
from quire.server.tools.reader import ReadingOptions, ReplyFormat, ReplyReader
from quire.server.tools.request import ToolUse, read_tools
from quire.server.tools.thinking_formats import THINKINGS

ROWS: dict[str, ToolFormat | Framed] = {name: row for row in TOOL_FORMATS for name in row.names}
THINKING: dict[str, Thinking] = {name: row for row in THINKINGS for name in row.names}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "unit": {"$ref": "#/$defs/unit"},
        "share": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "$defs": {"unit": {"enum": ["c", "f"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
_MARK = re.compile(r"\]<\]minimax\[>\[|｜DSML｜|<(?!/?｜DSML|\|plamo:)[^<>\s={}]+>|\[/?[A-Z_]+\]")
_PARTS_OF_MARKS = ("<|plamo:begin_", "<|plamo:end_", ":plamo|>", "<|plamo:constrain|>", "<|plamo:msg|>", "<param")
"""Tokens that are no whole marks."""


def use(choice: Any = None, **options: Any) -> ToolUse:
    """The tools of the tests, as a request gives them."""
    found = read_tools(TOOLS, choice, **options)
    assert found is not None
    return found


@cache
def marked_tokenizer() -> Tokenizer:
    """The bundled vocabulary with the marks of all formats as tokens."""
    backend = tokenizers.Tokenizer.from_file(str(bundled_folder() / "tokenizer.json"))
    marks = {mark for row in (*TOOL_FORMATS, *THINKINGS) for mark in _MARK.findall(str(row).replace("\\n", "\n"))}
    marks.update(_PARTS_OF_MARKS)
    backend.add_special_tokens(sorted(mark for mark in marks if "/" not in mark or len(mark) % 2))
    backend.add_tokens(sorted(mark for mark in marks if "/" in mark and not len(mark) % 2))
    return Tokenizer(backend, {})


def message(events: Iterable[Event]) -> Message:
    """The sum of events, which must be in order: each call begins, gets its arguments, and ends before the next."""
    total, live, num_calls = Message(), None, 0
    for event in events:
        if isinstance(event, ToolCallBegin):
            assert (live, event.index) == (None, num_calls)
            live, num_calls = event.index, num_calls + 1
        elif isinstance(event, ToolCallEnd):
            assert live == event.index
            live = None
        elif live is not None:
            assert not isinstance(event, TextDelta)
        total.add(event)
    assert live is None
    assert len({call.id for call in total.tool_calls}) == num_calls
    return total


def reader(
    tools: str | None, thinking: str | None = None, *, tokenizer: Tokenizer | None = None, **options: Any
) -> ReplyReader:
    """A reader for the formats of these names."""
    row = ROWS[tools] if tools else None
    framed = ROWS.get(thinking or "")
    reasoning = framed if isinstance(framed, Framed) else THINKING.get(thinking or "")
    form = ReplyFormat(row, reasoning, tokenizer)
    return ReplyReader(ReadingOptions(form, options.pop("use", use()), **options))


def read_pieces(made: ReplyReader, pieces: Iterable[str]) -> Message:
    """What a reader makes of a text that comes in these pieces."""
    events: list[Event] = []
    for piece in pieces:
        events += made.read(piece, [0], finished=False)
    return message(events + made.read("", [], finished=True))


def read_tokens(made: ReplyReader, text: str) -> Message:
    """What a reader makes of a text that comes token by token, through the engine's detokenizer."""
    tokenizer = marked_tokenizer()
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=False))
    events: list[Event] = []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        detokenizer.append([token_id])
        events += made.read(detokenizer.delta(), [token_id], finished=False)
    detokenizer.append([], finished=True)
    return message(events + made.read(detokenizer.delta(), [], finished=True))


def content(found: Message) -> tuple[str, str, list[tuple[str, str]]]:
    """A message without the ids of its calls."""
    return found.text, found.reasoning, [(call.name, call.arguments) for call in found.tool_calls]
