"""Finds the formats of a model: by name, by its chat template, or by the response template of its tokenizer."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol, TypeVar

from quire.engine.tokenizer import Tokenizer
from quire.errors import ConfigError
from quire.server.tools.format_types import Framed, Thinking
from quire.server.tools.formats import PLAIN_JSON, TOOL_FORMATS
from quire.server.tools.framed_formats import FRAMED_FORMATS
from quire.server.tools.reader import ReplyFormat
from quire.server.tools.response_template import texts_in, thinking_of, tools_of
from quire.server.tools.row_texts import suffix_of, with_suffix
from quire.server.tools.thinking_formats import THINKINGS


class _Named(Protocol):
    """A row of a table of formats."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def in_template(self) -> tuple[tuple[str, ...], ...]: ...


Row = TypeVar("Row", bound=_Named)

AUTO, NONE, HF = "auto", "none", "hf"
_REASONING: tuple[Framed | Thinking, ...] = (*FRAMED_FORMATS, *THINKINGS)


def check_parser_names(tool_call_parser: str, reasoning_parser: str) -> None:
    """Raise `ConfigError` for a name that no row has."""
    _named(tool_call_parser, TOOL_FORMATS, "tool_call_parser")
    _named(reasoning_parser, _REASONING, "reasoning_parser")


@lru_cache(maxsize=32)
def find_format(
    template: str,
    tokenizer: Tokenizer | None,
    tool_call_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    response_template: str = "",
) -> ReplyFormat:
    """The formats of the model with this chat template and tokenizer. Calls are plain JSON if nothing else is known.

    `response_template` is the tokenizer's, as JSON. Raises `ConfigError` for a parser's name that no row has.
    """
    tools = _named(tool_call_parser, TOOL_FORMATS, "tool_call_parser")
    thinking = _named(reasoning_parser, _REASONING, "reasoning_parser")
    shown = f"{template}\n{texts_in(response_template)}"
    if suffix := suffix_of(template, tokenizer):
        added = () if tokenizer is None else tokenizer.added_tokens.values()
        shown = "\n".join((shown, *added)).replace(f"{suffix}>", ">")
    if tool_call_parser in (AUTO, HF):
        tools = _matching(shown, TOOL_FORMATS) or tools_of(response_template)
        if tool_call_parser == HF:
            tools = tools_of(response_template) or tools
    if reasoning_parser in (AUTO, HF):
        thinking = _matching(shown, _REASONING) or thinking_of(response_template)
        if reasoning_parser == HF:
            thinking = thinking_of(response_template) or thinking
    return ReplyFormat(with_suffix(tools or PLAIN_JSON, suffix), with_suffix(thinking, suffix), tokenizer)


def _named(name: str, rows: tuple[Row, ...], option: str) -> Row | None:
    """The row called `name`; None for auto, none and hf, which prefers the tokenizer's response template."""
    if name in (AUTO, NONE, HF):
        return None
    for row in rows:
        if name in row.names:
            return row
    known = ", ".join(sorted(name for row in rows for name in row.names))
    raise ConfigError(f"{option} is {name!r}; it is {AUTO}, {HF}, {NONE} or one of {known}")


def _matching(template: str, rows: Iterable[Row]) -> Row | None:
    """The first row with a group of texts that are all in the template."""
    for row in rows:
        if any(all(text in template for text in group) for group in row.in_template):
            return row
    return None
