"""From the bytes of a body to a Struct: JSON, scalars as pydantic's lax mode reads them, unknown fields."""

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
        reason, _, place = str(error).partition(" - at `$")
        name = place.replace("[...]", "").strip(".`")  # a value of an object with any names
        raise Refusal(400, f"{name or 'the body'}: {reason}", code="invalid_type", param=name or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None


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
            case inspect.ListType(), list():
                return [relax(item, member.item_type) for item in value]
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
    """The field of `body_type` whose name is most like `name`; None if none is like it."""
    matches = get_close_matches(name[:_MAX_NAME_CHARS], _names(body_type), n=1, cutoff=0.7)
    return matches[0] if matches else None


def _names(body_type: type) -> list[str]:
    kind = _type_info(body_type)
    return [field.encode_name for field in kind.fields] if isinstance(kind, inspect.StructType) else []


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
