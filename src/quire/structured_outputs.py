"""StructuredOutputsParams: the constraint that a client puts on the text of an answer.

Field names are vLLM's. Values are checked here as far as possible without compiling; `quire.grammar` compiles.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from reprlib import repr as brief
from typing import Any

from quire.errors import RequestError

MAX_GRAMMAR_CHARS = 2**19
"""Maximum characters of a schema, a regular expression, a grammar, or all choices together."""
MAX_CHOICES = 2**12
KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""The kinds of constraint. Exactly one of these fields is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """One constraint, and the whitespace of JSON. Equal constraints compare equal.

    Raises `RequestError` for a value out of range, and unless exactly one kind is given.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as an object or as text. Kept as text."""
    regex: str | None = None
    """A regular expression that the whole text matches."""
    choice: tuple[str, ...] | None = None
    """The allowed texts."""
    grammar: str | None = None
    """A context-free grammar in Lark's syntax, or in EBNF as llama.cpp writes it (`root ::= …`)."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """No whitespace between the tokens of JSON. By default the model may write one blank there."""
    whitespace_pattern: str | None = None
    """A regular expression for the whitespace between the tokens of JSON."""
    disable_additional_properties: bool = True
    """A JSON schema's objects hold the properties that it lists and no others, unless the schema says
    `additionalProperties` itself. Without this, a model invents properties until it has no tokens left."""
    around: str = ""
    """Lark rules around the constraint, which they call `@body`: the server writes them for reasoning and calls."""
    asked_as: str = field(default="structured_outputs", compare=False)
    """The field in which the client sent it, named in errors."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except RequestError as error:
            raise RequestError(f"{self.asked_as}: {error.message}", param=self.asked_as) from None

    def _check(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(f"it sets {' and '.join(given) or 'nothing'}; set one of {', '.join(KINDS)}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {brief(getattr(self, name))}; it must be true or false")
        if self.json_object not in (None, True):
            raise RequestError(f"json_object is {brief(self.json_object)}; it must be true or false")
        spaced = self.disable_any_whitespace or self.whitespace_pattern is not None
        if spaced and self.kind not in ("json", "json_object"):
            raise RequestError(f"disable_any_whitespace and whitespace_pattern are for JSON; {self.kind} is set")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise RequestError("disable_any_whitespace and whitespace_pattern are both set; set one")

    def wrapped(self, around: str) -> "StructuredOutputsParams":
        """The constraint within Lark rules that call it `@body`."""
        return replace(self, around=around)

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in KINDS if getattr(self, name) is not None)


class CompactJson(str):
    """A JSON object that the caller has written without blanks: it is not read and written again."""

    __slots__ = ()


def _schema_text(schema: object) -> str:
    """The schema as compact JSON, so that equal schemas are equal texts."""
    if isinstance(schema, CompactJson):
        return str(schema)
    try:
        if isinstance(schema, str):
            _check_text("json", schema)
            schema = json.loads(schema)
        if not isinstance(schema, Mapping):
            raise RequestError(f"json is {brief(schema)}; a JSON schema is an object")
        # allow_nan=False: NaN is not JSON, and llguidance would refuse it with a worse message.
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise RequestError("json is nested too deeply to be read") from None
    except RequestError:
        raise
    except (TypeError, ValueError) as error:
        raise RequestError(f"json is not a JSON schema: {error}") from None


def _choices(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise RequestError(f"choice is {brief(value)}; it must be a list of texts")
    choices = tuple(dict.fromkeys(value))
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise RequestError(f"choice holds {len(choices)} texts; give 1 to {MAX_CHOICES}")
    for text in choices:
        if not isinstance(text, str) or not text:
            raise RequestError(f"choice holds {brief(text)}; each must be a non-empty text")
    _check_text("choice", "".join(choices))
    return choices


def _check_text(name: str, text: object) -> None:
    if text is None:
        return
    if not isinstance(text, str) or not text:
        raise RequestError(f"{name} is {brief(text)}; it must be a non-empty text")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"{name} has {len(text):,} characters; at most {MAX_GRAMMAR_CHARS:,} are allowed")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(f"{name} holds half of a surrogate pair and is no text")
