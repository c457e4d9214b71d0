"""Reads a call whose arguments stand between tags, and writes them as JSON while they come."""

from collections.abc import Callable

from quire.server.tools.arguments import as_json, is_text, json_types, property_schema, spelled_value
from quire.server.tools.formats import TagBody, ToolFormat
from quire.server.tools.request import Tool
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink


def read_tag_call(scan: Scanner, form: ToolFormat, body: TagBody, sink: Sink) -> Scan[None]:
    call_close, section_close = form.call[1].strip(), form.section[1].strip()
    key_open, end = body.key_open.strip(), body.end.strip()
    if body.name_open and not (yield from scan.accept(body.name_open)):
        raise NotACallError
    parts: list[str] = []
    name_close = body.name_close.strip()
    closers = tuple(mark for mark in (key_open, end, call_close, section_close) if mark)
    stop = yield from scan.until((name_close or "\n", *closers), parts.append, MAX_HEADER_CHARS)
    if not stop:
        raise NotACallError
    # Where nothing but a name follows the first mark, only a tool's name tells a call from text.
    tool = sink.begin("".join(parts).strip(), known_only=not body.name_open)
    if stop == name_close:
        scan.position += len(stop)
    sink.arguments("{")
    comma = ""
    while True:
        yield from scan.space()
        if not (yield from scan.accept(key_open)):
            break
        key, is_spelled = yield from _tag_key(scan, body)
        if not key:
            break
        sink.arguments(f"{comma}{as_json(key)}: ")
        comma = ", "
        if not (yield from _tag_value(scan, body, sink, tool, key, is_spelled=is_spelled, closers=closers)):
            sink.end()
            return
    sink.arguments("}")
    if end:
        yield from scan.accept(end)
    sink.end()


def _tag_key(scan: Scanner, body: TagBody) -> Scan[tuple[str, bool | None]]:
    """An argument's name, and whether its tag says that the value is a text."""
    parts: list[str] = []
    first, *others = [mark.strip() for mark in body.key_close.split("\n") if mark.strip()]
    quoted = first.startswith('"')
    stop = yield from scan.until(('"' if quoted else first,), parts.append, MAX_HEADER_CHARS)
    key, is_spelled = "".join(parts).strip(), None
    if not stop:
        return "", None
    scan.position += len(stop)
    if quoted:
        parts.clear()
        if not (yield from scan.until((">",), parts.append, MAX_HEADER_CHARS)):
            return "", None
        scan.position += 1
        attributes = "".join(parts)
        is_spelled = True if '"true"' in attributes else False if '"false"' in attributes else None
    for mark in others:
        yield from scan.space()
        yield from scan.accept(mark)
    return key, is_spelled


def _tag_value(
    scan: Scanner,
    body: TagBody,
    sink: Sink,
    tool: Tool | None,
    key: str,
    *,
    is_spelled: bool | None,
    closers: tuple[str, ...],
) -> Scan[bool]:
    """One value up to its closing tag, which may be missing. Returns False if the text ends first."""
    schema = property_schema(tool.parameters, key) if tool else {}
    root = tool.parameters if tool else {}
    value_close = body.value_close.strip()
    if body.strips_newlines:
        yield from scan.accept("\n")
    streams = is_spelled is True or (is_spelled is None and is_text(schema, root))
    parts: list[str] = []
    show: Callable[[str], None] = parts.append
    if streams:
        sink.arguments('"')
        show = _TextValue(sink, strips_newline=body.strips_newlines).add
    stop = yield from scan.until((value_close, *closers), show)
    if streams:
        if stop:
            sink.arguments('"')
    elif stop:
        text = "".join(parts)
        text = text.removesuffix("\n") if body.strips_newlines else text
        sink.arguments(as_json(spelled_value(text, json_types(schema, root))))
    if stop == value_close:
        scan.position += len(stop)
    return bool(stop)


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
