"""Reads a call whose arguments are an object in braces, with quotes of its own, and writes them as JSON."""

from collections.abc import Mapping
from typing import Any

from quire.server.tools.arguments import as_json, json_types, property_schema, resolve, spelled_value
from quire.server.tools.format_types import BracedBody, ToolFormat
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink

MAX_DEPTH = 32
"""Objects and lists within each other. What lies deeper ends the call."""

Schema = Mapping[str, Any]


def read_braced_call(scan: Scanner, form: ToolFormat, body: BracedBody, sink: Sink) -> Scan[None]:
    yield from scan.space()
    if not (yield from scan.accept(body.head)):
        raise NotACallError
    parts: list[str] = []
    close = form.call[1].strip()
    if (yield from scan.until(("{", close), parts.append, MAX_HEADER_CHARS)) != "{":
        raise NotACallError
    tool = sink.begin("".join(parts).strip())
    root = tool.parameters if tool else {}
    yield from _Values(scan, body, sink, root, close).object(resolve(root, root), depth=0)
    sink.end()


class _Values:
    """The values of one call. Methods return False if the text ends, or is no value, before the value does."""

    def __init__(self, scan: Scanner, body: BracedBody, sink: Sink, root: Schema, close: str) -> None:
        self._scan = scan
        self._quote = body.quote
        self._sink = sink
        self._root = root
        self._close = close

    def object(self, schema: Schema, depth: int) -> Scan[bool]:
        """An object, whose brace comes next. A call that ends within it ends it too."""
        scan = self._scan
        scan.position += 1
        self._sink.arguments("{")
        comma = ""
        while (yield from self._another("}", comma)):
            key = yield from self._key()
            if key is None:
                return False
            self._sink.arguments(f"{comma}{as_json(key)}: ")
            comma = ", "
            if not (yield from self._value(property_schema(schema, key, self._root), depth + 1)):
                return False
        return (yield from self._end("}"))

    def _list(self, schema: Schema, depth: int) -> Scan[bool]:
        self._scan.position += 1
        self._sink.arguments("[")
        comma = ""
        items = schema.get("items")
        while (yield from self._another("]", comma)):
            self._sink.arguments(comma)
            comma = ", "
            if not (yield from self._value(items if isinstance(items, Mapping) else {}, depth + 1)):
                return False
        return (yield from self._end("]"))

    def _another(self, end: str, comma: str) -> Scan[bool]:
        """Whether another member or item comes, instead of the end of the whole."""
        scan = self._scan
        yield from scan.space()
        if comma and (yield from scan.accept(",")):
            yield from scan.space()
        return (yield from scan.peek()) not in ("", end) and not (yield from scan.at(self._close))

    def _end(self, end: str) -> Scan[bool]:
        """The end of an object or a list, or of the call around it."""
        if not (yield from self._scan.accept(end)) and not (yield from self._scan.at(self._close)):
            return False
        self._sink.arguments(end)
        return True

    def _key(self) -> Scan[str | None]:
        """A member's name and the colon behind it; None if there is none."""
        scan, parts = self._scan, list[str]()
        quote = self._quote if (yield from scan.accept(self._quote)) else '"' if (yield from scan.accept('"')) else ""
        if quote:
            if not (yield from scan.until((quote,), parts.append, MAX_HEADER_CHARS)):
                return None
            scan.position += len(quote)
            yield from scan.space()
            return "".join(parts) if (yield from scan.accept(":")) else None
        stops = (":", ",", "}", self._quote, self._close)
        if (yield from scan.until(stops, parts.append, MAX_HEADER_CHARS)) != ":":
            return None
        scan.position += 1
        return "".join(parts).strip()

    def _value(self, schema: Schema, depth: int) -> Scan[bool]:
        scan, schema = self._scan, resolve(schema, self._root)
        yield from scan.space()
        if (yield from scan.accept(self._quote)):
            return (yield from self._text())
        match (yield from scan.peek()):
            case "":
                return False
            case '"':
                return (yield from scan.json(self._sink.arguments))
            case "{" | "[" if depth >= MAX_DEPTH:
                return False
            case "{":
                return (yield from self.object(schema, depth))
            case "[":
                return (yield from self._list(schema, depth))
        return (yield from self._word(schema))

    def _text(self) -> Scan[bool]:
        """A text whose first quote has been read."""
        self._sink.arguments('"')
        if not (yield from self._scan.until((self._quote,), lambda text: self._sink.arguments(as_json(text)[1:-1]))):
            return False
        self._scan.position += len(self._quote)
        self._sink.arguments('"')
        return True

    def _word(self, schema: Schema) -> Scan[bool]:
        """A number, true, false or null; whatever else stands there is a text without quotes."""
        parts: list[str] = []
        stops = (",", "}", "]", self._quote, self._close)
        stop = yield from self._scan.until(stops, parts.append)
        word = "".join(parts).strip()
        if not stop or not word:
            return False
        self._sink.arguments(as_json(spelled_value(word, json_types(schema, self._root))))
        return True
