"""Reads calls that are written as Python writes them, and their arguments as JSON."""

import re

from quire.server.tools.arguments import as_json, python_value
from quire.server.tools.format_types import PythonBody
from quire.server.tools.scanner import Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink

_IDENTIFIER = re.compile(r"[\w.\-:/]*")


def read_python_calls(scan: Scanner, body: PythonBody, sink: Sink) -> Scan[None]:
    if body.bracketed and not (yield from scan.accept("[")):
        raise NotACallError
    begun = False
    while True:
        yield from scan.space()
        start = scan.pin()
        try:
            yield from _python_call(scan, sink)
        except NotACallError:
            if not begun:
                raise
            scan.back_to(start)
            return
        begun = True
        if not body.bracketed:
            return
        yield from scan.space()
        if not (yield from scan.accept(",")):
            yield from scan.accept("]")
            return


def _python_call(scan: Scanner, sink: Sink) -> Scan[None]:
    """name(key=value, …)"""
    name = yield from _identifier(scan)
    if not name or not (yield from scan.accept("(")):
        raise NotACallError
    begun = False
    while True:
        yield from scan.space()
        closed = yield from scan.accept(")")
        key = "" if closed else (yield from _identifier(scan))
        yield from scan.space()
        if not closed and (not key or not (yield from scan.accept("="))):
            if not begun:
                raise NotACallError
            break
        if not begun:
            sink.begin(name)
            sink.arguments("{")
        if closed:
            sink.arguments("}")
            break
        value = yield from _python_text(scan)
        if value is None:
            break
        sink.arguments(f"{', ' if begun else ''}{as_json(key)}: {as_json(python_value(value))}")
        begun = True
        yield from scan.accept(",")
    sink.end()


def _identifier(scan: Scanner) -> Scan[str]:
    parts: list[str] = []
    while True:
        match = _IDENTIFIER.match(scan.text, scan.position)
        assert match is not None
        parts.append(match[0])
        scan.position = match.end()
        if scan.position < len(scan.text) or scan.ended:
            return "".join(parts)
        yield


def _python_text(scan: Scanner) -> Scan[str | None]:
    """The source of one value, up to the comma or bracket behind it; None if the text ends first."""
    parts, depth, quote = list[str](), 0, ""
    while char := (yield from scan.peek()):
        if quote and char == "\\":
            char = yield from scan.peek(2)
        elif quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}" and depth:
            depth -= 1
        elif char in ",)" and not depth:
            return "".join(parts)
        parts.append(char)
        scan.position += len(char)
    return None
