"""TagValues: reads values that stand between tags, and writes them as JSON while they come."""

from collections.abc import Callable, Mapping
from typing import Any

from quire.server.tools.arguments import as_json, is_text, json_types, property_schema, resolve, spelled_value
from quire.server.tools.format_types import TagBody
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import Sink

MAX_DEPTH = 32
"""Tags within each other. What lies deeper is read as text."""

Schema = Mapping[str, Any]


class TagValues:
    """The values of one call's arguments."""

    def __init__(self, scan: Scanner, body: TagBody, sink: Sink, root: Schema, closers: tuple[str, ...]) -> None:
        """`root` is the schema of all arguments. A value whose closing tag is missing ends at one of `closers`."""
        self._scan = scan
        self._body = body
        self._sink = sink
        self._root = root
        self._closers = closers

    def value(self, key: str, schema: Schema, *, is_spelled: bool | None = None, depth: int = 0) -> Scan[bool]:
        """One value up to its closing tag, which may be missing. Returns False if the text ends first.

        `is_spelled` says whether it is a text, where its tag says so.
        """
        close = self._body.value_close.strip().replace("{key}", key)
        if self._body.prefix and depth < MAX_DEPTH and (yield from self._nests()):
            complete = yield from self._nested(resolve(schema, self._root), depth + 1)
        else:
            complete = yield from self._leaf(schema, close, is_spelled)
        if complete:
            yield from self._scan.accept(close)
        return complete

    def _leaf(self, schema: Schema, close: str, is_spelled: bool | None) -> Scan[bool]:
        strips, sink = self._body.strips_newlines, self._sink
        if strips:
            yield from self._scan.accept("\n")
        quote = self._body.quote
        in_quotes = bool(quote[0]) and (yield from self._scan.accept(quote[0]))
        streams = is_spelled is True or (is_spelled is None and is_text(schema, self._root))
        parts: list[str] = []
        show: Callable[[str], None] = parts.append
        if streams:
            sink.arguments('"')
            show = _TextValue(sink, strips_newline=strips).add
        stops = (quote[1],) if in_quotes else self._closers if self._body.prefix else (close, *self._closers)
        stop = yield from self._scan.until(stops, show)
        if in_quotes:
            self._scan.position += len(stop)
        if streams:
            if stop:
                sink.arguments('"')
        elif stop:
            text = "".join(parts)
            text = text.removesuffix("\n") if strips else text
            sink.arguments(as_json(spelled_value(text, json_types(schema, self._root))))
        return bool(stop)

    def _nests(self) -> Scan[bool]:
        """Whether a tag is the first of the value. Reads nothing."""
        start = self._scan.pin()
        yield from self._scan.space()
        opens = yield from self._scan.at(self._body.key_open)
        closes = yield from self._scan.at(f"{self._body.key_open}/")
        self._scan.back_to(start)
        return opens and not closes

    def _nested(self, schema: Schema, depth: int) -> Scan[bool]:
        """Members of an object, or items of a list, up to the closing tag of the whole."""
        scan, sink, comma, is_list = self._scan, self._sink, "", None
        while True:
            yield from scan.space()
            if (yield from scan.at(f"{self._body.key_open}/")) or not (yield from scan.accept(self._body.key_open)):
                break
            parts: list[str] = []
            if not (yield from scan.until((">",), parts.append, MAX_HEADER_CHARS)):
                return False
            scan.position += 1
            key = "".join(parts).strip()
            if is_list is None:
                types = json_types(schema, self._root)
                is_list = "array" in types if types else key == "item"
                sink.arguments("[" if is_list else "{")
            sink.arguments(comma if is_list else f"{comma}{as_json(key)}: ")
            comma = ", "
            part = schema.get("items") if is_list else property_schema(schema, key, self._root)
            if not (yield from self.value(key, part if isinstance(part, Mapping) else {}, depth=depth)):
                return False
        if not (yield from scan.peek()):
            return False
        sink.arguments("]" if is_list else "}")
        return True


class _TextValue:
    """Shows a text as the inside of a JSON string, and holds the last newline back: it may belong to the tag."""

    def __init__(self, sink: Sink, *, strips_newline: bool) -> None:
        self._sink = sink
        self._held = ""
        self._mark = "\n" if strips_newline else ""

    def add(self, text: str) -> None:
        text = self._held + text
        self._held = self._mark if self._mark and text.endswith(self._mark) else ""
        text = text[: len(text) - len(self._held)]
        if text:
            self._sink.arguments(as_json(text)[1:-1])
