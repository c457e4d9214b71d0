"""From the bytes of a body to a Struct: JSON, scalars as pydantic's lax mode reads them, unknown fields."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from quire.server.errors import Refusal

T = TypeVar("T")

MAX_UNKNOWN = 8
"""Most unknown fields of one request that are named."""
_MAX_NAME_CHARS = 64
_LIMITS = ("max_tokens", "max_output_tokens")
_FORMATS = ("response_format", "text", "output_config", "format")
_OTHER_WORDS = {
    **dict.fromkeys(("max_new_tokens", "num_predict", "n_predict", "max_gen_len", "max_completion_tokens"), _LIMITS),
    **dict.fromkeys(("grammar", "regex", "guided_decoding"), ("structured_outputs", *_FORMATS)),
    **dict.fromkeys(("json_schema", "format", "output_format", "response_format"), _FORMATS),
    **dict.fromkeys(("enable_thinking", "thinking"), ("chat_template_kwargs", "think")),
    "reasoning": ("reasoning_effort",),
    "reasoning_effort": ("reasoning", "output_config", "think"),
    "max_tokens": _LIMITS,
    "stop_sequences": ("stop",),
    "stop": ("stop_sequences",),
    "function_call": ("tool_choice",),
    "functions": ("tools",),
    "messages": ("input",),
    "system": ("instructions",),
    "num_beams": ("beam_width",),
    "random_seed": ("seed",),
}
"""Words of other servers → fields that mean the same here, where an endpoint has one of them."""
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_STEP = re.compile(r"\w+|\[\d+\]")
_WORDS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}


def decode_json(body: bytes, body_type: type[T]) -> T:
    """`body` as `body_type`. Raises `Refusal` (400) that names the field at fault."""
    try:
        try:
            return _decoder(body_type).decode(body)  # type: ignore[no-any-return,arg-type]  # lru_cache loses the type
        except msgspec.ValidationError as error:
            relaxed = relax(_read(body, error), _type_info(body_type))  # type: ignore[arg-type]
            return msgspec.convert(relaxed, body_type, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), _type_info(body_type)) from None  # type: ignore[arg-type]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None


def _refusal(error: str, kind: inspect.Type) -> Refusal:
    """msgspec's `error` with the field's name in front, and what a field of few values takes."""
    reason, _, place = error.partition(" - at `$")
    name = place.replace("[...]", "").strip(".`")  # a value of an object with any names
    if missing := _MISSING.fullmatch(reason):
        name = f"{name}.{missing[1]}" if name else missing[1]
        return Refusal(400, f"{name} is missing", code="missing_field", param=name)
    if reason.startswith("Invalid enum value") and (values := _values_at(name, kind)):
        reason += f"; there is {', '.join(map(str, values))}"
    return Refusal(400, f"{name or 'the body'}: {reason}", code="invalid_type", param=name or None)


def _values_at(path: str, kind: inspect.Type) -> tuple[object, ...]:
    """The values that the field at `path` takes, if these are few."""
    members = _members(_at(path, kind))
    return next((member.values for member in members if isinstance(member, inspect.LiteralType)), ())


def _at(path: str, kind: inspect.Type) -> inspect.Type:
    """The type of the field at `path`, such as a.b[0]; of a path that does not exist any."""
    for step in _STEP.findall(path):
        found: inspect.Type = inspect.AnyType()
        for member in _members(kind):
            match member:
                case inspect.StructType() if step[0] != "[":
                    found = next((field.type for field in member.fields if field.encode_name == step), found)
                case inspect.ListType() if step[0] == "[":
                    found = member.item_type
        kind = found
    return kind


def _members(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _read(body: bytes, error: msgspec.ValidationError) -> object:
    """`body` as plain values. Raises `error` if a number in it is too large for any field."""
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        raise error from None


def relax(value: object, kind: inspect.Type) -> object:
    """`value` with the scalars that pydantic's lax mode takes and msgspec's does not: true as a number, "yes" and 1.0
    as a boolean, and numbers in a text with blanks. Where a field may be of several scalar types nothing is changed."""
    members = [kind] if not isinstance(kind, inspect.UnionType) else list(kind.types)
    members = [member for member in members if not isinstance(member, inspect.NoneType)]
    for member in members:
        match member, value:
            case inspect.Metadata(), _:
                return relax(value, member.type)
            case inspect.StructType(), dict():
                types = {field.encode_name: field.type for field in member.fields}
                return {name: relax(item, types[name]) if name in types else item for name, item in value.items()}
            case inspect.ListType(), list():  # a list of numbers holds token ids, and no client means a boolean there
                return [item if isinstance(item, bool) else relax(item, member.item_type) for item in value]
            case inspect.DictType(), dict():
                return {name: relax(item, member.value_type) for name, item in value.items()}
    return _relax_scalar(value, members[0]) if len(members) == 1 else value


def unknown_fields(body: bytes, body_type: type) -> list[str]:
    """Fields of `body`, a valid body of `body_type`, that the type does not have and that are not null. A field of a
    nested object is written as a path."""
    found: list[str] = []
    _find_unknown(body, _type_info(body_type), "", found)
    return found


@lru_cache(maxsize=512)
def nearest_field(name: str, body_type: type) -> str | None:
    """The field of `body_type` that `name` is another server's word for, or that is spelled most like it; None if there
    is none. The name of a field of a nested object is a path, and so is the answer."""
    above, _, last = name.rpartition(".")
    known = _names(_at(above, _type_info(body_type)))
    meant = [field for field in _OTHER_WORDS.get(last, ()) if field in known]
    meant += get_close_matches(last[:_MAX_NAME_CHARS], known, n=1, cutoff=0.7)
    return f"{above}.{meant[0]}".lstrip(".") if meant else None


def _names(kind: inspect.Type) -> list[str]:
    structs = [member for member in _members(kind) if isinstance(member, inspect.StructType)]
    return [field.encode_name for struct in structs for field in struct.fields]


def _find_unknown(body: bytes | msgspec.Raw, kind: inspect.Type, path: str, found: list[str]) -> None:
    if isinstance(kind, inspect.UnionType):
        kind = next((member for member in kind.types if isinstance(member, inspect.StructType)), kind)
    if not isinstance(kind, inspect.StructType):
        return
    types: Mapping[str, inspect.Type] = {field.encode_name: field.type for field in kind.fields}
    tag = kind.tag_field
    try:
        items = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:  # the union's other member
        return
    for name, raw in items.items():
        if len(found) == MAX_UNKNOWN:  # a body may hold thousands
            return
        if name in types:
            _find_unknown(raw, types[name], f"{path}{name}.", found)
        elif name != tag and bytes(raw) != b"null":
            found.append(f"{path}{name[:_MAX_NAME_CHARS]}")


def _relax_scalar(value: object, kind: inspect.Type) -> object:
    match kind, value:
        case inspect.BoolType(), str():
            return _WORDS.get(value.strip().lower(), value)
        case inspect.BoolType(), float() if value in (0.0, 1.0):
            return bool(value)
        case ((inspect.IntType() | inspect.FloatType()), bool()):
            return int(value)
        case ((inspect.IntType() | inspect.FloatType()), str()):
            return value.strip()
    return value


@lru_cache
def _decoder(body_type: type) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(body_type, strict=False)


@lru_cache
def _type_info(body_type: type) -> inspect.Type:
    return inspect.type_info(body_type)  # takes milliseconds for a large type
