"""GrammarCache: compiles once, keeps within its bounds, finds grammars in use, does not keep failures."""

import gc

import pytest

from quire.errors import RequestError
from quire.grammar.cache import GrammarCache
from quire.grammar.compiled import Grammar, Matcher
from quire.structured_outputs import StructuredOutputsParams


class CountingCompiler:
    """Compiles every regular expression but `bad`, and records the calls."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, constraint: StructuredOutputsParams) -> Grammar:
        assert constraint.regex is not None
        self.compiled.append(constraint.regex)
        if constraint.regex == "bad":
            raise RequestError("no grammar")
        return Grammar(no_matcher, vocab_size=33, eos_token_ids=(1,))


def no_matcher() -> Matcher:
    raise AssertionError("the tests use no matcher")


def constraint(regex: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=regex)


def test_compiles_once_and_keeps_the_recently_used() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=2, max_bytes=100)
    first = cache.compile(constraint("a")).result()
    assert first.num_mask_words == 2
    assert cache.compile(constraint("a")).result() is first
    cache.compile(constraint("b")).result()
    cache.compile(constraint("a")).result()
    cache.compile(constraint("c")).result()  # b is the least recently used
    assert len(cache) == 2
    gc.collect()
    assert cache.find(constraint("b")) is None
    assert cache.compile(constraint("a")).result() is first
    cache.compile(constraint("b")).result()
    assert compiler.compiled == ["a", "b", "c", "b"]


def test_a_grammar_in_use_is_found_after_many_others() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=1, max_bytes=100)
    in_use = cache.compile(constraint("a")).result()
    for number in range(5):
        cache.compile(constraint(f"x{number}")).result()
    assert cache.find(constraint("a")) is in_use
    assert cache.compile(constraint("a")).result() is in_use
    assert compiler.compiled.count("a") == 1


def test_over_the_bytes_the_least_recently_used_is_removed_first() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=9, max_bytes=100)
    for name, num_bytes, kept, held in (("a", 40, 1, 40), ("b", 60, 2, 100), ("a", 40, 2, 100), ("c", 30, 2, 70)):
        cache.compile(constraint(name), num_bytes).result()
        assert (len(cache), cache.num_bytes) == (kept, held), name
    large = cache.compile(constraint("d"), 101).result()
    assert (len(cache), cache.num_bytes) == (0, 0)
    assert cache.find(constraint("d")) is large, "as long as it is in use"


def test_a_failure_is_raised_and_not_kept() -> None:
    compiler = CountingCompiler()
    cache = GrammarCache(lambda: compiler, max_grammars=4, max_bytes=100)
    for _ in range(2):
        with pytest.raises(RequestError, match="no grammar"):
            cache.compile(constraint("bad")).result()
    assert compiler.compiled == ["bad", "bad"]


def test_a_worn_grammar_is_compiled_again() -> None:
    cache = GrammarCache(CountingCompiler, max_grammars=4, max_bytes=100)
    worn = cache.compile(constraint("a")).result()
    worn.worn = True
    fresh = cache.compile(constraint("a")).result()
    assert fresh is not worn
    assert cache.find(constraint("a")) is fresh


def test_a_vocabulary_that_cannot_be_loaded_fails_every_grammar() -> None:
    def load() -> CountingCompiler:
        raise RequestError("no tokenizer.json")

    cache = GrammarCache(load, max_grammars=4, max_bytes=100)
    cache.warm()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            cache.compile(constraint("a")).result()
