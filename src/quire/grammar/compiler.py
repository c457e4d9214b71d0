"""GrammarCompiler: from what a client asks for to a Grammar over one model's tokens.

llguidance parses, and knows which tokens keep the text a prefix of something the grammar accepts; here is how it is
asked, how much it may use, and how its refusals become a client's.
"""

import json
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from quire.errors import RequestError
from quire.grammar.compiled import Grammar
from quire.structured_outputs import StructuredOutputsParams

WHITESPACE = r"[ \n\r\t]{1,32}"
"""Between the tokens of JSON, unless asked otherwise: room to indent, and none to fill the whole output with."""
MAX_REASON_CHARS = 500
"""Of llguidance's reasons; some quote the grammar."""
_LIMITS = LLParserLimits(
    max_items_in_row=1_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""What compiling and a single token may cost, in llguidance's units; what exceeds them is an error, not a wait."""


class GrammarCompiler:
    """Compiles for one vocabulary. `vocab_size` is the model's, which may be larger than the tokenizer's."""

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer_json` is the content of the file. Raises `RequestError` for a tokenizer llguidance cannot use."""
        eos = list(eos_token_ids) or None
        try:
            try:
                own = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
            except ValueError:
                own = LLTokenizer(tokenizer_json, eos_token=eos)  # more tokens than the model: a mask is cut off later
        except ValueError as error:
            raise RequestError(
                f"structured outputs are not available with this model's tokenizer: {error}",
                param="structured_outputs",
                code="not_available",
            ) from error
        self.tokenizer = own

    def compile(self, form: StructuredOutputsParams) -> Grammar:
        """Raises `RequestError`, with llguidance's reason, for what is no grammar or takes too much."""
        try:
            template = LLMatcher(self.tokenizer, _source(form), log_level=0, limits=_LIMITS)
            if not template.is_error():
                template.compute_bitmask()  # some grammars explode only when they are first used
        except BaseException as error:
            # A panic of llguidance's own is no Exception to Python, but it must not take more than its request along.
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            raise _refusal(form, str(error) or type(error).__name__) from None
        if template.is_error():
            raise _refusal(form, template.get_error())
        return Grammar(
            template.deep_copy, vocab_size=self.tokenizer.vocab_size, eos_token_ids=tuple(self.tokenizer.eos_tokens)
        )


def _source(form: StructuredOutputsParams) -> str:
    """The grammar as llguidance reads it."""
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.choice is not None:
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in form.choice)
        )
    if form.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(form.grammar))
    schema = form.json if isinstance(form.json, str) else '{"type":"object"}'
    options: dict[str, object] = {"whitespace_flexible": False}
    if not form.disable_any_whitespace:
        options = {"whitespace_flexible": True, "whitespace_pattern": form.whitespace_pattern or WHITESPACE}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]  # a TypedDict


def _refusal(form: StructuredOutputsParams, reason: str) -> RequestError:
    reason = " ".join(reason.split())
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[:MAX_REASON_CHARS] + "…"
    return RequestError(
        f"{form.asked_as}: the {form.kind} cannot be compiled: {reason}",
        param=form.asked_as,
        code="invalid_grammar",
    )
