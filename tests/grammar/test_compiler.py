"""GrammarCompiler: the token table is the tokenizer's, masks match their definition, explosions are errors."""

import json
import lzma
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.checkpoint import bundled_folder
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.grammar.compiler import GrammarCompiler
from quire.structured_outputs import StructuredOutputsParams

TOKENIZERS = Path(__file__).parents[1] / "data" / "tokenizers"
VOCAB_SIZE, EOS = 1024, 1


@cache
def compiler() -> GrammarCompiler:
    text = (bundled_folder() / "tokenizer.json").read_text()
    return GrammarCompiler(text, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))


@cache
def bundled() -> Tokenizer:
    return Tokenizer.from_folder(bundled_folder())


def allowed(constraint: StructuredOutputsParams, token_ids: list[int]) -> tuple[set[int], list[int]]:
    """The allowed next tokens by llguidance's mask, and the tokens that it forces."""
    matcher: Any = compiler().compile(constraint).matcher()
    assert matcher.consume_tokens(token_ids), matcher.get_error()
    if matcher.is_stopped():
        return {EOS}, []
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    forced = matcher.compute_ff_tokens()
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")[:VOCAB_SIZE]).tolist()), forced


@pytest.mark.parametrize("name", ["gpt2", "llama3-style-4k", "mistral-v1"])
def test_tokens_are_the_bytes_that_the_tokenizer_writes(name: str, tmp_path: Path) -> None:
    text = lzma.decompress((TOKENIZERS / name / "tokenizer.json.xz").read_bytes()).decode()
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = Tokenizer.from_folder(tmp_path)
    table = GrammarCompiler(text, vocab_size=tokenizer.vocab_size + 5, eos_token_ids=(2,)).tokenizer
    assert table.vocab_size == tokenizer.vocab_size + 5
    plain = [token_id for token_id in range(tokenizer.vocab_size) if token_id not in tokenizer.added_tokens]
    differing = [i for i in plain if table.decode_bytes([i]) != tokenizer.token_bytes(i)]
    # 0xFF is in no UTF-8 text; llguidance marks special tokens with it.
    assert [tokenizer.token_bytes(i) for i in differing] == [b"\xff"]


words = st.text(st.sampled_from("abtheé "), min_size=1, max_size=6)


@settings(max_examples=60)
@given(st.lists(words, min_size=1, max_size=6, unique=True), st.data())
def test_a_mask_keeps_the_text_a_prefix_of_an_answer(choices: list[str], data: st.DataObject) -> None:
    """The definition, for every token: some answer begins with the text and the token's bytes.

    If the next bytes are the same in all answers, only the tokenizer's own token for them is allowed, and the tokens
    forced after it are in all answers.
    """
    answers = [choice.encode() for choice in choices]
    spelled = {i: bundled().token_bytes(i) for i in range(VOCAB_SIZE) if i not in bundled().special_ids}
    text, tokens = b"", list[int]()
    constraint = StructuredOutputsParams(choice=tuple(choices))
    while True:
        expected = {
            i for i, piece in spelled.items() if piece and any(answer.startswith(text + piece) for answer in answers)
        }
        expected |= {EOS} if text in answers else set()
        found, forced = allowed(constraint, tokens)
        if forced:
            assert found == {forced[0]} <= expected
            run = text + b"".join(spelled[token] for token in forced)
            assert all(answer.startswith(run) for answer in answers if answer.startswith(text))
            expected = found
        assert found == expected
        token = data.draw(st.sampled_from(sorted(expected)))
        if token == EOS:
            return
        tokens.append(token)
        text += spelled[token]


@pytest.mark.parametrize(
    ("fields", "whole", "broken"),
    [
        ({"regex": r"[0-9]{2}-(ab|cd)+"}, ["12-ab", "90-cdab"], ["1-ab", "12-abx", "12-"]),
        ({"grammar": 'start: "a" number\nnumber: /[0-9]+/'}, ["a1", "a42"], ["a", "1", "a1b"]),
        ({"grammar": 'root ::= "a" num\nnum ::= [0-9]+'}, ["a1", "a42"], ["a", "ab"]),
        ({"choice": ["é\n\"'😀", "b"]}, ["é\n\"'😀", "b"], ["é\n", "c"]),
        ({"json_object": True}, ['{"a": [1, {"b": null}]}', "{}"], ["[]", '{"a"', "{} x"]),
        ({"json_object": True, "disable_any_whitespace": True}, ['{"a":[1,2]}'], ['{"a": 1}', "{ }"]),
        ({"json_object": True, "whitespace_pattern": " "}, ['{"a": 1}'], ['{"a":  1}', '{"a":\n1}']),
        ({"json_object": True}, ['{"a": 1}', '{ "a":1 }'], ['{"a":  1}', '{"a":\n1}']),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 12}}, ["3", "12"], ["2", "13", "03"]),
    ],
)
def test_whole_texts_are_accepted_and_others_are_not(
    fields: dict[str, Any], whole: list[str], broken: list[str]
) -> None:
    grammar = compiler().compile(StructuredOutputsParams(**fields))
    for text in whole + broken:
        matcher: Any = grammar.matcher()
        accepted = matcher.consume_tokens(bundled().encode(text, add_special_tokens=False)) and matcher.is_accepting()
        assert accepted == (text in whole), text


@pytest.mark.parametrize("special", ["<|end|>", "<|assistant|>", "a <|system|> b", "<|begin|><|begin|>"])
def test_literals_that_spell_a_special_token_are_spelled(special: str) -> None:
    """In every kind of grammar: with ordinary tokens, whether the text is forced or chosen."""
    quoted = json.dumps(special)
    obj = {"type": "object", "properties": {special: {"const": 1}}, "required": [special]}
    for fields, text in (
        ({"choice": [special]}, special),
        ({"choice": [special, "other"]}, special),
        ({"regex": re.escape(special)}, special),
        ({"grammar": f"start: {quoted}"}, special),
        ({"grammar": f"root ::= {quoted}"}, special),
        ({"json": {"const": special}}, quoted),
        ({"json": {"enum": [special, 1]}}, quoted),
        ({"json": obj}, f"{{{quoted}:1}}"),
    ):
        matcher: Any = compiler().compile(StructuredOutputsParams(**fields)).matcher()  # type: ignore[arg-type]
        written = b""
        while not matcher.is_accepting():
            token = (matcher.compute_ff_tokens() or [None])[0]
            if token is None:
                rest = text.encode()[len(written) :]
                mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
                allowed = [int(i) for i in np.flatnonzero(mask) if i > 4]
                token = next(i for i in allowed if rest.startswith(bundled().token_bytes(i)))
            assert token not in bundled().special_ids
            assert matcher.consume_token(token)
            written += bundled().token_bytes(token)
        assert written.decode() in (text, text.replace(":1", ": 1"))


def test_a_lark_grammar_may_name_special_tokens() -> None:
    for name in ("<|end|>", "<[1]>"):
        grammar = f'?start: "<|end|>" x // <|user|>\n!x: {name} /b/'
        matcher: Any = compiler().compile(StructuredOutputsParams(grammar=grammar)).matcher()
        spelled = matcher.compute_ff_tokens()
        assert spelled[-2] == 1
        assert b"".join(map(bundled().token_bytes, spelled[:-2])) == b"<|end|>"


def test_many_choices_that_begin_alike() -> None:
    choices = tuple(f"choice {i}" for i in range(4000))
    for fields in ({"choice": choices}, {"json": {"enum": list(choices)}}):
        matcher: Any = compiler().compile(StructuredOutputsParams(**fields)).matcher()  # type: ignore[arg-type]
        text = "choice 3999" if "choice" in fields else '"choice 3999"'
        assert matcher.consume_tokens(bundled().encode(text, add_special_tokens=False)), matcher.get_error()
        assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": "(" * 3000 + "a" + ")" * 3000}, "regex"),
        ({"grammar": "start: missing"}, "unknown name"),
        ({"grammar": 'root ::= "a" [0-9'}, "end of input"),
        ({"grammar": "start: A\nA: /(.*[abc]){30}/ & ~/(.*[bcd]){30}/ & /(.*x.*y){20}/"}, "fuel exhausted"),
        ({"json": {"type": "array", "uniqueItems": True}}, 'keywords "uniqueItems" cannot be enforced'),
        ({"json": {"$ref": "https://example.com/s.json"}}, "does not fetch"),
        ({"json": {"$ref": "#"}}, "contains itself without an end"),
        ({"json": {"$ref": "#/$defs/x"}}, "not in the schema"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "no value can satisfy it: minimum"),
        ({"grammar": 'start: "a"{2000000000,2147483647}'}, "Too many items"),
        ({"grammar": 'root ::= "a"{2000000000,2147483647}'}, "Too many items"),
        ({"grammar": "start: /[xy]a{2000000000}/"}, "repeats something at least 2,000,000,000 times"),
        ({"regex": "[xy](a{1000}){1000}"}, "repeats something at least 1,000,000 times"),
        ({"json": {"type": "string", "pattern": "^((ab){200}c{3}){200}$"}}, "repeats something at least 40,000 times"),
        (
            {
                "json": {
                    "allOf": [
                        {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "integer"}}} for j in range(3)]}
                        for i in range(14)
                    ]
                }
            },
            "too large",
        ),
    ],
)
def test_an_invalid_or_exploding_grammar_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        compiler().compile(StructuredOutputsParams(**fields))
    assert (refused.value.param, refused.value.code) == ("structured_outputs", "invalid_grammar")
    assert len(refused.value.message) < 600


def test_a_tokenizer_that_llguidance_cannot_read_is_named() -> None:
    with pytest.raises(RequestError, match="not available with this model's tokenizer"):
        GrammarCompiler("{}", vocab_size=10, eos_token_ids=(1,))
