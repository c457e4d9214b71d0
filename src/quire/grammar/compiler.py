"""GrammarCompiler: from a client's constraint to a Grammar over one model's tokens.

llguidance parses the constraint and finds the tokens that keep the text a prefix of an accepted text. This file calls
it, limits its work and turns its refusals into errors for the client.
"""

import json
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from quire.errors import RequestError
from quire.grammar.compiled import Grammar
from quire.grammar.json_schema import WHITESPACE, closed
from quire.structured_outputs import StructuredOutputsParams

MAX_REASON_CHARS = 500
"""Limit for llguidance's reasons; some quote the grammar."""
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
            source = _source(constraint)
            if constraint.around:
                source = _around(constraint.around, source)
            template = LLMatcher(self.tokenizer, source, log_level=0, limits=_LIMITS)
            if not template.is_error():
                template.compute_bitmask()  # some grammars explode only on first use
        except BaseException as error:
            # A panic inside llguidance is not an Exception in Python. It must end only its own request.
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            raise _refusal(constraint, str(error) or type(error).__name__) from None
        if template.is_error():
            raise _refusal(constraint, template.get_error())
        return Grammar(
            template.deep_copy, vocab_size=self.tokenizer.vocab_size, eos_token_ids=tuple(self.tokenizer.eos_tokens)
        )


def _source(constraint: StructuredOutputsParams) -> str:
    """The constraint as a grammar that llguidance reads."""
    if constraint.regex is not None:
        return LLMatcher.grammar_from_regex(constraint.regex)
    if constraint.choice is not None:
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in constraint.choice)
        )
    if constraint.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(constraint.grammar))
    schema = constraint.json if isinstance(constraint.json, str) else '{"type":"object"}'
    if constraint.disable_additional_properties:
        schema = json.dumps(closed(json.loads(schema)), ensure_ascii=False)
    options: dict[str, object] = {"whitespace_flexible": False}
    if not constraint.disable_any_whitespace:
        options = {"whitespace_flexible": True, "whitespace_pattern": constraint.whitespace_pattern or WHITESPACE}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]  # a TypedDict


def _around(rules: str, body: str) -> str:
    """The grammar of `rules`, in which `@body` is the grammar `body`."""
    (inner,) = json.loads(body)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": rules}, {**inner, "name": "body"}]}, ensure_ascii=False)


def _refusal(constraint: StructuredOutputsParams, reason: str) -> RequestError:
    reason = " ".join(reason.split())
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[:MAX_REASON_CHARS] + "…"
    return RequestError(
        f"{constraint.asked_as}: the {constraint.kind} cannot be compiled: {reason}",
        param=constraint.asked_as,
        code="invalid_grammar",
    )
