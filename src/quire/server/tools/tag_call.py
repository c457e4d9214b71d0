"""Reads a call whose arguments stand between tags, and writes them as JSON while they come."""

from quire.server.tools.arguments import as_json, property_schema
from quire.server.tools.format_types import TagBody, ToolFormat
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink
from quire.server.tools.tag_values import TagValues


def read_tag_call(scan: Scanner, form: ToolFormat, body: TagBody, sink: Sink) -> Scan[None]:
    call_close, section_close = form.call[1].strip(), form.section[1].strip()
    key_open, end = body.key_open.strip(), body.end.strip()
    if body.name_open and not (yield from scan.accept(body.name_open)):
        raise NotACallError
    parts: list[str] = []
    name_close = body.name_close.strip()
    closers = tuple(mark for mark in (key_open, end, call_close, section_close) if mark)
    if body.prefix:  # all of them begin with it
        closers = (body.prefix,)
    stop = yield from scan.until((name_close or "\n", *closers), parts.append, MAX_HEADER_CHARS)
    if not stop:
        raise NotACallError
    # Where nothing but a name follows the first mark, only a tool's name tells a call from text.
    tool = sink.begin("".join(parts).strip(), known_only=not body.name_open)
    if stop == name_close:
        scan.position += len(stop)
    sink.arguments("{")
    comma = ""
    root = tool.parameters if tool else {}
    values = TagValues(scan, body, sink, root, closers)
    while True:
        yield from scan.space()
        if (body.prefix and (yield from scan.at(f"{key_open}/"))) or not (yield from scan.accept(key_open)):
            break
        key, is_spelled = yield from _tag_key(scan, body)
        if not key:
            break
        sink.arguments(f"{comma}{as_json(key)}: ")
        comma = ", "
        if not (yield from values.value(key, property_schema(root, key), is_spelled=is_spelled)):
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
