"""CallRules: Lark rules of tool calls, from a format's row and the tools' schemas."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from quire.grammar.json_schema import WHITESPACE, prepared
from quire.server.tools.arguments import is_text, json_types, property_schema, resolve
from quire.server.tools.formats import HeaderBody, JsonBody, PythonBody, TagBody, ToolFormat
from quire.server.tools.marks import Marks
from quire.server.tools.request import Tool, ToolUse

MAX_CACHED_CHARS = 2**14


class Rules:
    """Rules of one Lark grammar."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}

    def add(self, name: str, body: str, options: str = "") -> str:
        """Add a rule; returns its name."""
        self._rules[name] = f"{name}{f'[{options}]' if options else ''}: {body}"
        return name

    def lark(self, start: str) -> str:
        """The grammar that begins with `start`."""
        return "\n".join([f"start: {start}", *self._rules.values()])


class CallRules:
    """The calls of one request in one format."""

    def __init__(self, rules: Rules, form: ToolFormat | None, marks: Marks, use: ToolUse) -> None:
        self._rules = rules
        self._form = form
        self._marks = marks
        self._use = use

    @staticmethod
    def quoted(text: str) -> str:
        """A text as Lark writes it."""
        return json.dumps(text, ensure_ascii=False)

    def calls(self, most: int, *, without_opener: bool = False) -> str:
        """At least one call, and `most` of them if calls may be parallel."""
        form, mark = self._form, self._marks.lark
        assert form is not None
        self._rules.add("call", " | ".join(self._call(tool, index) for index, tool in enumerate(self._use.tools)))
        listed = isinstance(form.body, JsonBody) and form.body.listed
        in_brackets = listed or (isinstance(form.body, PythonBody) and form.body.bracketed)
        between = '", "' if in_brackets else mark(form.between)
        more = f" ({between} call){{0,{most - 1}}}" if self._use.parallel and most > 1 else ""
        calls = f"call{more}"
        if in_brackets:
            calls = f'"[" {calls} "]"'
        whole = f"{mark(form.section[0])} {calls} {mark(form.section[1])}".strip()
        if not without_opener:
            return whole
        # What follows the first mark of the format: the mark itself has been written.
        first = next(text for text in form.openers)
        if form.section[0]:
            rest = first.removeprefix(first.strip())
            return f"{mark(rest)} {calls} {mark(form.section[1])}".strip()
        bodies = [self._body(tool, index) for index, tool in enumerate(self._use.tools)]
        rest = form.call[0].removeprefix(first.strip())
        self._rules.add("opened_call", f"{mark(rest)} ({' | '.join(bodies)}) {mark(form.call[1])}")
        return f"opened_call{more}"

    def _call(self, tool: Tool, index: int) -> str:
        form, mark = self._form, self._marks.lark
        assert form is not None
        return " ".join(part for part in (mark(form.call[0]), self._body(tool, index), mark(form.call[1])) if part)

    def _body(self, tool: Tool, index: int) -> str:
        assert self._form is not None
        name = f"call_{index}"
        match self._form.body:
            case JsonBody() as body:
                id_part = f'"{body.id_key}": "0", ' if body.id_key else ""
                head = f'{{{id_part}"{body.name_key}": {json.dumps(tool.name)}, "{body.arguments_key}": '
                rule = f'{self.quoted(head)} {self.arguments(tool)} "}}"'
            case HeaderBody() as body:
                rule = f"{self._header(body, tool)} {self._marks.lark(body.middle)} {self.arguments(tool)}"
            case TagBody() as body:
                rule = _TagRules(self._rules, self._marks, self._form, body, tool, name).call()
            case PythonBody():
                rule = _PythonRules(self._rules, tool, name).call()
        return self._rules.add(name, rule)

    def _header(self, body: HeaderBody, tool: Tool) -> str:
        before, index, after = body.header.replace("{name}", tool.name).partition("{index}")
        return f"{self.quoted(before)} {'/[0-9]/' if index else ''} {self._marks.lark(after)}"

    def arguments(self, tool: Tool) -> str:
        """The arguments as one JSON object. Only a strict or forced call follows the schema."""
        if not (tool.strict or self._use.forced):
            return json_rule({"type": "object"})
        return json_rule({"type": "object", **tool.parameters})


def json_rule(schema: Mapping[str, Any]) -> str:
    """A value of the schema, with one blank between the tokens of JSON at most."""
    text = json.dumps(schema, ensure_ascii=False)
    return _cached_rule(text) if len(text) <= MAX_CACHED_CHARS else _rule(text)


def _rule(schema: str) -> str:
    options = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    prepared_schema = {**prepared(json.loads(schema), closes=True), "x-guidance": options}
    return f"%json {json.dumps(prepared_schema, ensure_ascii=False)}"


_cached_rule = lru_cache(maxsize=1024)(_rule)
"""Agents send the same tools with every request, and preparing a large schema takes a millisecond."""


class _Properties:
    """The arguments of one tool by name. A schema that does not list them lets every name through."""

    def __init__(self, tool: Tool) -> None:
        self.root = tool.parameters
        schema = resolve(self.root, self.root)
        listed = schema.get("properties")
        names = list(listed) if isinstance(listed, Mapping) else []
        required = schema.get("required")
        wanted = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        self.required = [*(name for name in names if name in wanted), *(name for name in wanted if name not in names)]
        self.optional = [name for name in names if name not in wanted]
        extra = schema.get("additionalProperties", not isinstance(listed, Mapping))
        self.extra = extra if isinstance(extra, Mapping) else {} if extra else None
        """The schema of arguments that are not listed; None if there are none."""

    def schema(self, name: str) -> Mapping[str, Any]:
        """The schema of one argument, with the definitions that it may refer to."""
        definitions = {key: self.root[key] for key in ("$defs", "definitions") if key in self.root}
        return {**property_schema(self.root, name), **definitions}


class _TagRules:
    """A call with its arguments between tags."""

    def __init__(self, rules: Rules, marks: Marks, form: ToolFormat, body: TagBody, tool: Tool, name: str) -> None:
        self._rules = rules
        self._marks = marks
        self._body = body
        self._tool = tool
        self._name = name
        closers = (body.value_close, body.key_open, body.end, form.call[1], form.section[1])
        texts = [marks.encode(mark.strip()) for mark in closers if mark.strip()]
        self._forbidden = [text for text in texts if len(text) > 1 or text.isascii()]

    def call(self) -> str:
        """The whole call."""
        body, mark, listed = self._body, self._marks.lark, _Properties(self._tool)
        parts = [mark(f"{body.name_open}{self._tool.name}{body.name_close}")]
        parts += [self._argument(listed, name, index) for index, name in enumerate(listed.required)]
        parts += [
            f"{self._argument(listed, name, index)}?"
            for index, name in enumerate(listed.optional, len(listed.required))
        ]
        if listed.extra is not None:
            parts.append(f"{self._extra(listed, listed.extra)}{{0,8}}")
        parts.append(mark(body.end))
        return " ".join(part for part in parts if part)

    def _argument(self, listed: _Properties, name: str, index: int) -> str:
        schema = listed.schema(name)
        texts = not _is_json(schema, listed.root)
        head = self._head(self._marks.lark, name, texts=texts)
        return self._rules.add(f"{self._name}_{index}", f"{head} {self._value(schema, listed.root, index)}")

    def _extra(self, listed: _Properties, schema: Mapping[str, Any]) -> str:
        opened = self._marks.lark(self._body.key_open)
        closed_key = self._marks.lark(self._body.key_close.replace("{is_text}", "true"))
        number = len(listed.required) + len(listed.optional)
        value = self._value(schema, listed.root, number)
        return self._rules.add(f"{self._name}_extra", f"{opened} /[a-zA-Z_][a-zA-Z0-9_]{{0,30}}/ {closed_key} {value}")

    def _head(self, mark: Any, name: str, *, texts: bool) -> str:
        key_close = self._body.key_close.replace("{is_text}", "true" if texts else "false")
        return str(mark(f"{self._body.key_open}{name}{key_close}"))

    def _value(self, schema: Mapping[str, Any], root: Mapping[str, Any], index: int) -> str:
        close = self._marks.lark(self._body.value_close)
        if _is_json(schema, root):
            return f"{json_rule(schema)} {close}"
        if (spelled := _choices(schema)) is not None:
            return f"({' | '.join(map(CallRules.quoted, spelled))}) {close}"
        name = f"{self._name}_text_{index}".upper()
        self._rules.add(name, self._text(schema))
        first, second = self._body.value_close.strip(), self._body.value_close.rpartition(">")[2]
        if self._marks.token_id(first) is not None:
            return f"{name} {self._marks.lark(self._body.value_close.lstrip())}"  # the text has the newline before it
        rule = self._rules.add(f"{self._name}_text_{index}", name, f"suffix={CallRules.quoted(first)}")
        return f"{rule} {self._marks.lark(second)}"

    def _text(self, schema: Mapping[str, Any]) -> str:
        """A text that keeps its limits of length and its pattern, and contains no tag."""
        newline = "\\n" if self._body.strips_newlines else ""
        parts = []
        if self._forbidden:
            parts.append(f"~/(.|\\n)*({'|'.join(map(_escaped, self._forbidden))})(.|\\n)*/")
        low, high = schema.get("minLength", 0), schema.get("maxLength", "")
        limits = "*" if (low, high) == (0, "") else f"{{{low},{high}}}"
        parts.insert(0, f"/(.|\\n){limits}{newline}/")
        if isinstance(pattern := schema.get("pattern"), str):
            parts.insert(0, f"/{_anchored(pattern)}{newline}/")
        return " & ".join(parts)


class _PythonRules:
    """A call as Python writes it."""

    def __init__(self, rules: Rules, tool: Tool, name: str) -> None:
        self._rules = rules
        self._tool = tool
        self._name = name

    def call(self) -> str:
        """The whole call."""
        listed = _Properties(self._tool)
        required = [self._argument(listed, name, index) for index, name in enumerate(listed.required)]
        optional = [
            self._argument(listed, name, index) for index, name in enumerate(listed.optional, len(listed.required))
        ]
        if required:
            body = ' ", " '.join(required) + "".join(f' (", " {rule})?' for rule in optional)
        else:
            body = " | ".join(
                rule + "".join(f' (", " {later})?' for later in optional[index + 1 :])
                for index, rule in enumerate(optional)
            )
            body = f"({body})?" if body else ""
        return f'{CallRules.quoted(self._tool.name + "(")} {body} ")"'

    def _argument(self, listed: _Properties, name: str, index: int) -> str:
        value = json_rule(listed.schema(name))
        return self._rules.add(f"{self._name}_{index}", f"{CallRules.quoted(name + '=')} {value}")


def _is_json(schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """True if no value is a text, so that all are written as JSON."""
    types = json_types(schema, root)
    return bool(types) and "string" not in types and not is_text(schema, root)


def _choices(schema: Mapping[str, Any]) -> list[str] | None:
    """The values of an enumeration as they are spelled."""
    values: Sequence[Any] | None = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not values:
        return None
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]


def _escaped(text: str) -> str:
    """The text as a part of an expression in slashes."""
    return re.sub(r"[.^$*+?()\[\]{}|\\/]", r"\\\g<0>", text).replace("\n", "\\n")


def _anchored(pattern: str) -> str:
    """A JSON schema's pattern, which may match anywhere, as an expression for the whole text."""
    before = "" if pattern.startswith("^") else "(.|\\n)*"
    after = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(.|\\n)*"
    body = pattern.removeprefix("^")
    body = body[:-1] if not after else body
    return f"{before}({body}){after}".replace("/", "\\/")
