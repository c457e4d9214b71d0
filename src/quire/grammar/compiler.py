"""GrammarCompiler: from a client's constraint to a Grammar over one model's tokens.

llguidance parses the constraint and finds the tokens that keep the text a prefix of an accepted text. This file calls
it, limits its work and turns its refusals into errors for the client.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from quire.errors import RequestError
from quire.grammar.compiled import Grammar
from quire.grammar.json_schema import WHITESPACE, prepared
from quire.grammar.repetition import check_repetitions, expressions_in_lark, expressions_in_schema
from quire.grammar.special_tokens import name_by_id, rename_special_tokens
from quire.structured_outputs import StructuredOutputsParams

MAX_REASON_CHARS = 500
"""Limit for llguidance's reasons; some quote the grammar."""
_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_MODIFIER = re.compile(r"^(\s*)[?!]+(?=[a-zA-Z_]\w*\s*[.:\[{])", re.MULTILINE)
"""Marks in front of a rule's name; in Lark they say how the tree is built."""
_LIMITS = LLParserLimits(
    max_items_in_row=1_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Cost limits of compiling and of a single token, in llguidance's units. Exceeding one is an error, not a wait."""


class GrammarCompiler:
    """Compiles constraints for one vocabulary. `vocab_size` is the model's; it may exceed the tokenizer's."""

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer_json` is the file's content. Raises `RequestError` for a tokenizer that llguidance cannot use."""
        eos = list(eos_token_ids) or None
        try:
            tokenizer_json, self._special_ids = rename_special_tokens(tokenizer_json)
            try:
                own = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
            except ValueError:
                own = LLTokenizer(
                    tokenizer_json, eos_token=eos
                )  # it has more tokens than the model: masks are cut later
        except ValueError as error:
            raise RequestError(
                f"structured outputs are not available with this model's tokenizer: {error}",
                param="structured_outputs",
                code="not_available",
            ) from error
        self.tokenizer = own

    def compile(self, constraint: StructuredOutputsParams) -> Grammar:
        """The compiled constraint. Raises `RequestError`, with llguidance's reason, if it is invalid or too large."""
        try:
            for expression in _expressions(constraint):
                check_repetitions(expression)
            source = _source(constraint, self._special_ids)
            if constraint.around:
                source = _around(constraint.around, source)
            template = LLMatcher(self.tokenizer, source, log_level=0, limits=_LIMITS)
            if not template.is_error():
                _try_out(template)
        except BaseException as error:
            # A panic inside llguidance is not an Exception in Python. It must end only its own request.
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            reason = error.message if isinstance(error, RequestError) else str(error)
            raise _refusal(constraint, reason or type(error).__name__) from None
        if template.is_error():
            raise _refusal(constraint, template.get_error())
        return Grammar(
            template.deep_copy, vocab_size=self.tokenizer.vocab_size, eos_token_ids=tuple(self.tokenizer.eos_tokens)
        )


def _expressions(constraint: StructuredOutputsParams) -> Iterator[str]:
    """All regular expressions of a constraint."""
    if constraint.regex is not None:
        yield constraint.regex
    if constraint.whitespace_pattern is not None:
        yield constraint.whitespace_pattern
    if constraint.grammar is not None:
        yield from expressions_in_lark(constraint.grammar)
    if isinstance(constraint.json, str):
        yield from expressions_in_schema(json.loads(constraint.json))


def _try_out(template: LLMatcher) -> None:
    """Compute the first mask and the tokens that the grammar forces: some grammars explode only on use."""
    template.compute_bitmask()
    forced = template.compute_ff_tokens()
    if forced and not template.is_error():
        probe = template.deep_copy()
        probe.consume_tokens(forced)
        if not probe.is_error() and not probe.is_stopped():
            probe.compute_bitmask()
        if probe.is_error():
            raise ValueError(probe.get_error())


def _source(constraint: StructuredOutputsParams, special_ids: Mapping[str, int]) -> str:
    """The constraint as a grammar that llguidance reads. `special_ids` are those of the special tokens by name."""
    if constraint.regex is not None:
        return LLMatcher.grammar_from_regex(constraint.regex)
    if constraint.choice is not None:
        # One terminal: as rules, many choices that begin alike would exceed the limit of a parser's row.
        choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in constraint.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    if constraint.grammar is not None:
        return LLMatcher.grammar_from_lark(name_by_id(_lark(constraint.grammar), special_ids))
    schema = constraint.json if isinstance(constraint.json, str) else '{"type":"object"}'
    closes = constraint.disable_additional_properties
    schema = json.dumps(prepared(json.loads(schema), closes=closes), ensure_ascii=False)
    options: dict[str, object] = {"whitespace_flexible": False}
    if not constraint.disable_any_whitespace:
        options = {"whitespace_flexible": True, "whitespace_pattern": constraint.whitespace_pattern or WHITESPACE}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]  # a TypedDict


def _lark(grammar: str) -> str:
    """A client's grammar in llguidance's Lark: from GBNF, or from Lark with modifiers that change only its trees."""
    if _GBNF_RULE.search(grammar):
        return str(gbnf_to_lark(grammar))
    return _MODIFIER.sub(r"\1", grammar)


def _around(rules: str, body: str) -> str:
    """The grammar of `rules`, in which `@body` is the grammar `body`."""
    (inner,) = json.loads(body)["grammars"] if body.startswith("{") else [{"lark_grammar": body}]
    return json.dumps({"grammars": [{"lark_grammar": rules}, {**inner, "name": "body"}]}, ensure_ascii=False)


_REASONS = (
    (r"Unimplemented keys: \[(.*?)\]", r"the schema's keywords \1 cannot be enforced; leave them out"),
    (r"NoExtensionBias", "no text can satisfy it, because it contains itself without an end"),
    (r"Unsatisfiable schema: (.*)", r"no value can satisfy it: \1"),
    (r"Pointer '(.*?)' does not exist", r"$ref leads to \1, which is not in the schema"),
)
"""llguidance's reasons that say little to a client, and ours."""


def _refusal(constraint: StructuredOutputsParams, reason: str) -> RequestError:
    reason = " ".join(reason.replace("<non-verbose/>", "").split())
    for pattern, text in _REASONS:
        reason = re.sub(pattern, text, reason)
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[:MAX_REASON_CHARS] + "…"
    return RequestError(
        f"{constraint.asked_as}: the {constraint.kind} cannot be compiled: {reason}",
        param=constraint.asked_as,
        code="invalid_grammar",
    )
