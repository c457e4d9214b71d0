"""How a family writes tool calls and reasoning: the types of the rows in the table of formats.

Marks are written as the model's template writes them, white space included. A reader takes that white space as
optional; a grammar writes it. A mark that is a token of the vocabulary is matched by its id (see `marks`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonBody:
    """One JSON object with name and arguments, or one list of such objects for all calls."""

    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = ""
    listed: bool = False
    keyed: bool = False
    """An object has one member: the name, and the arguments as its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderBody:
    """The name, `middle`, then the arguments as JSON."""

    middle: str
    header: str = "{name}"
    """How the name is written: text, {name}, and {index} for the number of the call."""
    id_mark: str = ""
    """Stands before the call's id, if the model writes one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TagBody:
    """The name, then each argument between tags of its own: texts as they are, other values as JSON."""

    name_open: str
    name_close: str
    """A name or key that ends with a quote may be followed by attributes, up to the end of the tag. May hold {index},
    the number of the call."""
    key_open: str
    key_close: str
    """May hold {is_text} or {type}: an attribute that says whether the value is a text, or its JSON type."""
    value_close: str
    """May hold {key}, the argument's name."""
    end: str
    tag_end: str = ">"
    escapes: bool = False
    """Names and keys are written with the entities &amp; and &quot;."""
    type_tag: tuple[str, str] = ("", "")
    """Tags of a value's type, which may stand behind its key."""
    quote: tuple[str, str] = ("", "")
    """Marks that may stand around a text."""
    whole: tuple[str, str] = ("", "")
    """Tags around all arguments as one JSON object, which may replace the tags of each."""
    prefix: str = ""
    """Stands before every tag, and nowhere else. Objects and lists are then tags within tags: the name of a member or
    of an item is the tag's."""

    @property
    def strips_newlines(self) -> bool:
        """A newline on each side of a value belongs to the tags."""
        return self.value_close.startswith("\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonBody:
    """Calls as Python writes them: `[f(a=1), g(b="x")]`, or one a line."""

    bracketed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BracedBody:
    """`head`, the name, and an object in braces: names of members as they are, texts between quotes of their own.

    A text knows no escapes. JSON is read too, and a grammar writes objects and lists within the arguments as JSON.
    """

    head: str
    quote: str


Body = JsonBody | HeaderBody | TagBody | PythonBody | BracedBody


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How one family writes tool calls."""

    names: tuple[str, ...]
    """Names for --tool-call-parser, vLLM's among them."""
    body: Body
    section: tuple[str, str] = ("", "")
    """Marks around all calls of a reply."""
    call: tuple[str, str] = ("", "")
    """Marks around each call."""
    between: str = ""
    """What a grammar writes between two calls."""
    separators: str = ""
    """Characters that may stand between two calls."""
    also_opens: tuple[str, ...] = ()
    """Marks that begin the calls where the model leaves out the first mark."""
    bare: bool = False
    """A reply may begin with a call without any mark. Its name must be that of a tool."""
    id_style: str = "call"
    """call: call_ and 24 hexadecimal digits; nine: 9 letters or digits, as Mistral's templates demand; header: what
    the model wrote as the header."""
    in_template: tuple[tuple[str, ...], ...] = ()
    """The row belongs to a chat template that holds all texts of one of these groups."""

    @property
    def openers(self) -> tuple[str, ...]:
        """Marks that begin a call or all calls."""
        return tuple(dict.fromkeys(mark for mark in (self.section[0], self.call[0], *self.also_opens) if mark))


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """gpt-oss (harmony): every part of a reply is a message with a channel, and a call is a message to a function."""

    names: tuple[str, ...]
    start: str = "<|start|>"
    channel: str = "<|channel|>"
    constrain: str = "<|constrain|>"
    message: str = "<|message|>"
    end: str = "<|end|>"
    final_end: str = "<|return|>"
    call_end: str = "<|call|>"
    in_template: tuple[tuple[str, ...], ...] = (("<|channel|>", "<|message|>"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """A reply is a row of messages. The header of each says what follows: reasoning, text or calls."""

    names: tuple[str, ...]
    begin: str
    """Begins a header."""
    heads: tuple[str, ...]
    """Marks that end a header."""
    ends: tuple[str, ...]
    """Marks that end a message."""
    opening: str
    """What the template writes of a header before the model goes on."""
    reasoning: tuple[str, str]
    """The rest of the header of a message with reasoning, and the end of that message."""
    text: tuple[str, str]
    text_heads: tuple[str, ...]
    """Ends of headers of further messages with text."""
    calls_head: str
    """The rest of the header of a message with calls. May hold {name}; each call then has a message of its own."""
    calls_end: str
    calls: ToolFormat
    """How calls are written within their message."""
    in_template: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How one family marks its reasoning."""

    names: tuple[str, ...]
    """Names for --reasoning-parser, vLLM's among them."""
    open: str
    close: str
    also_open: tuple[str, ...] = ()
    """Marks of other efforts of reasoning."""
    also_close: tuple[str, ...] = ()
    in_template: tuple[tuple[str, ...], ...] = ()

    @property
    def opens(self) -> tuple[str, ...]:
        """Marks that begin the reasoning."""
        return (self.open.strip(), *self.also_open)

    @property
    def closes(self) -> tuple[str, ...]:
        """Marks that end the reasoning."""
        return (self.close.strip(), *self.also_close)


Framed = Channels | Messages
"""Formats that mark every part of a reply, reasoning and text included."""
