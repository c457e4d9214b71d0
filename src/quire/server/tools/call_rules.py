"""CallRules: Lark rules of tool calls, from a format's row and the tools' schemas."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from quire.grammar.json_schema import WHITESPACE, prepared
from quire.server.tools.arguments import is_text, json_types, property_schema, resolve
from quire.server.tools.format_types import BracedBody, HeaderBody, JsonBody, Messages, PythonBody, TagBody, ToolFormat
from quire.server.tools.marks import Marks
from quire.server.tools.request import Tool, ToolUse

MAX_CACHED_CHARS = 2**14
_BARE_NAME = re.compile(r"[\w-]+")
_INDEX = "/[0-9]/"
_TYPE_NAMES = {"integer": "number"}
"""JSON types that tags call otherwise."""


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

    def messages(self, row: Messages, most: int) -> str:
        """Like `calls`, with the headers of the messages that hold them."""
        mark = self._marks.lark
        if "{name}" not in row.calls_head:
            return f"{mark(row.calls_head)} {self.calls(most)}"
        heads = [mark(row.calls_head.replace("{name}", tool.name)) for tool in self._use.tools]
        begin, end = map(mark, row.calls.section)
        calls = [
            f"{head} {begin} {self._call(tool, i)} {end}"
            for i, (head, tool) in enumerate(zip(heads, self._use.tools, strict=True))
        ]
        self._rules.add("message", " | ".join(calls))
        again = f"{mark(row.calls_end)} {mark(row.opening)} message"
        return f"message ({again}){{0,{most - 1}}}" if self._use.parallel and most > 1 else "message"

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
                head = f"{{{json.dumps(tool.name)}: " if body.keyed else head
                rule = f'{self.quoted(head)} {self.arguments(tool)} "}}"'
            case HeaderBody() as body:
                rule = f"{self._header(body, tool)} {self._marks.lark(body.middle)} {self.arguments(tool)}"
            case TagBody() as body:
                rule = _TagRules(self._rules, self._marks, self._form, body, tool, name).call()
            case PythonBody():
                rule = _PythonRules(self._rules, tool, name).call()
            case BracedBody() as body:
                rule = _BracedRules(self._rules, self._marks, body, tool, name).call()
        return self._rules.add(name, rule)

    def _header(self, body: HeaderBody, tool: Tool) -> str:
        before, index, after = body.header.replace("{name}", tool.name).partition("{index}")
        return f"{self.quoted(before)} {_INDEX if index else ''} {self._marks.lark(after)}"

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
        closers: tuple[str, ...] = (body.value_close, body.key_open, body.end, form.call[1], form.section[1])
        if body.prefix:
            closers = (body.prefix,)
        self._forbidden = [mark.strip() for mark in closers if mark.strip() and marks.before_token(mark) is None]

    def call(self) -> str:
        """The whole call."""
        body, mark, listed = self._body, self._marks.lark, _Properties(self._tool)
        head, index, rest = f"{body.name_open}{self._escaped(self._tool.name)}{body.name_close}".partition("{index}")
        parts = [mark(head), _INDEX if index else "", mark(rest)]
        parts += [self._argument(listed, name, index) for index, name in enumerate(listed.required)]
        parts += [
            f"{self._argument(listed, name, index)}?"
            for index, name in enumerate(listed.optional, len(listed.required))
        ]
        if listed.extra is not None and "{key}" not in body.value_close:  # a grammar cannot repeat a free name
            parts.append(f"{self._extra(listed, listed.extra)}{{0,8}}")
        parts.append(mark(body.end))
        return " ".join(part for part in parts if part)

    def _argument(self, listed: _Properties, name: str, index: int) -> str:
        schema = listed.schema(name)
        types = json_types(schema, listed.root) if _is_json(schema, listed.root) else {"string"}
        head = self._marks.lark(f"{self._body.key_open}{self._escaped(name)}{self._key_close(types)}")
        return self._rules.add(f"{self._name}_{index}", f"{head} {self._value(schema, listed.root, name, index)}")

    def _extra(self, listed: _Properties, schema: Mapping[str, Any]) -> str:
        opened = self._marks.lark(self._body.key_open)
        closed_key = self._marks.lark(self._key_close({"string"}))
        value = self._value(schema, listed.root, "", len(listed.required) + len(listed.optional))
        body = f"{opened} /[a-zA-Z_][a-zA-Z0-9_]{{0,30}}/ {closed_key} {value}"
        return self._rules.add(f"{self._name}_extra", body)

    def _key_close(self, types: set[str]) -> str:
        """What follows a key whose values have one of these types."""
        name = min(_TYPE_NAMES.get(kind, kind) for kind in types)
        closed = self._body.key_close.replace("{is_text}", "true" if types == {"string"} else "false")
        return closed.replace("{type}", name)

    def _escaped(self, name: str) -> str:
        return name.replace("&", "&amp;").replace('"', "&quot;") if self._body.escapes else name

    def _value(self, schema: Mapping[str, Any], root: Mapping[str, Any], key: str, index: int) -> str:
        close = self._body.value_close.replace("{key}", key)
        if _is_json(schema, root):
            return f"{json_rule(schema)} {self._marks.lark(close)}"
        if (spelled := _choices(schema)) is not None:
            return f"({' | '.join(map(CallRules.quoted, spelled))}) {self._marks.lark(close)}"
        name = f"{self._name}_text_{index}"
        return _closed_text(self._rules, self._marks, name, schema, close, self._forbidden)


class _BracedRules:
    """A call whose arguments are an object in braces with quotes of its own."""

    def __init__(self, rules: Rules, marks: Marks, body: BracedBody, tool: Tool, name: str) -> None:
        self._rules = rules
        self._marks = marks
        self._body = body
        self._tool = tool
        self._name = name
        self._forbidden = [body.quote] if marks.before_token(body.quote) is None else []

    def call(self) -> str:
        """The whole call."""
        listed = _Properties(self._tool)
        head = CallRules.quoted(f"{self._body.head}{self._tool.name}")
        if listed.extra is not None and not listed.required and not listed.optional:
            return f"{head} {json_rule({'type': 'object', 'additionalProperties': True})}"
        return f'{head} "{{" {_separated(listed, self._argument, ",")} "}}"'

    def _argument(self, listed: _Properties, name: str, index: int) -> str:
        key = CallRules.quoted(f"{name}:" if _BARE_NAME.fullmatch(name) else f"{json.dumps(name)}:")
        return self._rules.add(f"{self._name}_{index}", f"{key} {self._value(listed.schema(name), listed.root, index)}")

    def _value(self, schema: Mapping[str, Any], root: Mapping[str, Any], index: int) -> str:
        mark = self._marks.lark(self._body.quote)
        if _is_json(schema, root) or _is_combined(schema):
            return json_rule(schema)
        values: list[Any] | None = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values:
            spelled = [
                f"{mark} {CallRules.quoted(value)} {mark}" if isinstance(value, str) else json_rule({"const": value})
                for value in values
            ]
            return f"({' | '.join(spelled)})"
        name, quote = f"{self._name}_text_{index}", self._body.quote
        text = f"{mark} {_closed_text(self._rules, self._marks, name, schema, quote, self._forbidden)}"
        others = sorted(json_types(schema, root) - {"string"})
        return f"({text} | {json_rule({**schema, 'type': others})})" if others else text


class _PythonRules:
    """A call as Python writes it."""

    def __init__(self, rules: Rules, tool: Tool, name: str) -> None:
        self._rules = rules
        self._tool = tool
        self._name = name

    def call(self) -> str:
        """The whole call."""
        listed = _Properties(self._tool)
        return f'{CallRules.quoted(self._tool.name + "(")} {_separated(listed, self._argument, ", ")} ")"'

    def _argument(self, listed: _Properties, name: str, index: int) -> str:
        value = json_rule(listed.schema(name))
        return self._rules.add(f"{self._name}_{index}", f"{CallRules.quoted(name + '=')} {value}")


def _separated(listed: _Properties, argument: Callable[[_Properties, str, int], str], comma: str) -> str:
    """All arguments in the order of the schema, those that are not required left out or not, with `comma` between."""
    between = CallRules.quoted(comma)
    required = [argument(listed, name, index) for index, name in enumerate(listed.required)]
    optional = [argument(listed, name, index) for index, name in enumerate(listed.optional, len(listed.required))]
    if required:
        return f" {between} ".join(required) + "".join(f" ({between} {rule})?" for rule in optional)
    body = " | ".join(
        rule + "".join(f" ({between} {later})?" for later in optional[index + 1 :])
        for index, rule in enumerate(optional)
    )
    return f"({body})?" if body else ""


def _closed_text(
    rules: Rules, marks: Marks, name: str, schema: Mapping[str, Any], close: str, forbidden: Sequence[str]
) -> str:
    """A rule for a text of `schema` that contains nothing forbidden, and the mark `close` behind it."""
    mark, trailing = close.strip(), close[len(close.rstrip()) :]
    before = marks.before_token(mark)
    # What stands in front of a token belongs to the text's terminal, which ends where the token comes.
    ending = ("\n" if close.startswith("\n") else "") + (before or "")
    terminal = rules.add(name.upper(), _text(schema, forbidden, _escaped(ending)))
    if before is not None:
        return f"{terminal} {marks.lark(mark[len(before) :] + trailing)}"
    rule = rules.add(name, terminal, f"suffix={CallRules.quoted(mark)}")
    return f"{rule} {marks.lark(trailing)}"


def _text(schema: Mapping[str, Any], forbidden: Sequence[str], ending: str) -> str:
    """A text that keeps its limits of length and its pattern, and contains nothing forbidden; `ending` follows."""
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    limits = "*" if (low, high) == (0, "") else f"{{{low},{high}}}"
    parts = [f"/(.|\\n){limits}{ending}/"]
    if forbidden:
        parts.append(f"~/(.|\\n)*({'|'.join(map(_escaped, forbidden))})(.|\\n)*/")
    if isinstance(pattern := schema.get("pattern"), str):
        parts.insert(0, f"/{_anchored(pattern)}{ending}/")
    return " & ".join(parts)


def _is_combined(schema: Mapping[str, Any]) -> bool:
    return any(name in schema for name in ("anyOf", "oneOf", "allOf", "not", "if"))


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
