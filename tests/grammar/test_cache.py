"""GrammarCache: compiled once, kept within bounds, found as long as it is in use, failures forgotten."""

import gc

import pytest

from quire.errors import RequestError
from quire.grammar.cache import GrammarCache
from quire.grammar.compiled import Grammar, Matcher
from quire.structured_outputs import StructuredOutputsParams


class CountingCompiler:
    """Compiles any regular expression but `bad`, and remembers how often."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, form: StructuredOutputsParams) -> Grammar:
        assert form.regex is not None
        self.compiled.append(form.regex)
        if form.regex == "bad":
            raise RequestError("no grammar")
        return Grammar(no_matcher, vocab_size=33, eos_token_ids=(1,))


def no_matcher() -> Matcher:
    raise AssertionError("nobody follows it here")


def form(regex: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=regex)


def test_compiles_once_and_keeps_the_last_used() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=2, max_bytes=100)
    first = cache.compile(form("a")).result()
    assert first.num_mask_words == 2
    assert cache.compile(form("a")).result() is first
    cache.compile(form("b")).result()
    cache.compile(form("a")).result()
    cache.compile(form("c")).result()  # b was used least lately
    assert len(cache) == 2
    gc.collect()
    assert cache.find(form("b")) is None
    assert cache.compile(form("a")).result() is first
    cache.compile(form("b")).result()
    assert compiler.compiled == ["a", "b", "c", "b"]


def test_what_is_in_use_is_found_however_many_came_since() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=1, max_bytes=100)
    in_use = cache.compile(form("a")).result()
    for number in range(5):
        cache.compile(form(f"x{number}")).result()
    assert cache.find(form("a")) is in_use
    assert cache.compile(form("a")).result() is in_use
    assert compiler.compiled.count("a") == 1


def test_what_exceeds_the_bytes_is_forgotten_the_least_recently_used_first() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=9, max_bytes=100)
    for name, num_bytes, kept, held in (("a", 40, 1, 40), ("b", 60, 2, 100), ("a", 40, 2, 100), ("c", 30, 2, 70)):
        cache.compile(form(name), num_bytes).result()
        assert (len(cache), cache.num_bytes) == (kept, held), name
    large = cache.compile(form("d"), 101).result()
    assert (len(cache), cache.num_bytes) == (0, 0)
    assert cache.find(form("d")) is large, "as long as it is in use"


def test_a_failure_is_told_and_not_kept() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=4, max_bytes=100)
    for _ in range(2):
        with pytest.raises(RequestError, match="no grammar"):
            cache.compile(form("bad")).result()
    assert compiler.compiled == ["bad", "bad"]


def test_a_worn_grammar_is_compiled_anew() -> None:
    cache = GrammarCache(CountingCompiler, max_grammars=4, max_bytes=100)
    worn = cache.compile(form("a")).result()
    worn.worn = True
    fresh = cache.compile(form("a")).result()
    assert fresh is not worn
    assert cache.find(form("a")) is fresh


def test_a_vocabulary_that_cannot_be_loaded_fails_every_grammar() -> None:
    def load() -> CountingCompiler:
        raise RequestError("no tokenizer.json")

    cache = GrammarCache(load, max_grammars=4, max_bytes=100)
    cache.warm()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            cache.compile(form("a")).result()
