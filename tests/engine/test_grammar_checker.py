"""Grammars are checked within a second, even if one kills or blocks the process that compiles it."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from quire.engine import grammar_checker, grammar_process
from quire.engine.checkpoint import bundled_folder
from quire.engine.grammar_checker import AsyncGrammarChecker, GrammarChecker
from quire.errors import EngineUnavailableError, QueueFullError, RequestError
from quire.grammar.compiled import Grammar
from quire.structured_outputs import StructuredOutputsParams

GOOD = StructuredOutputsParams(regex="[a-z]+")
SLOW = StructuredOutputsParams(json={"type": "integer", "multipleOf": 999983}, asked_as="response_format")
"""Within llguidance's limits, and seconds to compile."""


def new_checker(folder: Path | None = None) -> GrammarChecker:
    return GrammarChecker(folder or bundled_folder(), vocab_size=1024, eos_token_ids=(1,))


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    checker = new_checker()
    yield checker
    checker.close()


def test_good_passes_bad_is_refused_and_the_process_stays(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    process = checker._process.pid
    for bad, reason in (
        (StructuredOutputsParams(regex="(", asked_as="guided_regex"), "guided_regex: .* unclosed group"),
        (StructuredOutputsParams(json={"type": "strnig"}, asked_as="guided_json"), "json cannot be compiled"),
    ):
        started = time.monotonic()
        with pytest.raises(RequestError, match=reason) as refused:
            checker.check(bad)
        assert time.monotonic() - started < 5
        assert (refused.value.status, refused.value.code, refused.value.param) == (400, "invalid_grammar", bad.asked_as)
    checker.check(StructuredOutputsParams(json_object=True))
    assert checker._process.pid == process


def test_an_explosion_ends_soon_and_the_next_grammar_is_checked(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    process = checker._process.pid
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(
            RequestError, match=r"response_format: the json takes more than 0\.7 s to compile"
        ) as refused:
            checker.check(SLOW)
        assert time.monotonic() - started < 5, "0.7 s, and what a busy machine adds"
        assert refused.value.param == "response_format"
    checker.check(StructuredOutputsParams(regex="[0-9]+"))
    assert checker._process.pid == process


def test_a_grammar_that_kills_who_compiles_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killing:
        def compile(self, form: StructuredOutputsParams) -> Grammar:
            os.kill(os.getpid(), signal.SIGSEGV)
            raise AssertionError("unreachable")

    answer = grammar_process._check(Killing(), SLOW)
    assert answer.error == "response_format: the json takes too much memory; make it simpler"


def test_a_process_that_has_ended_is_replaced(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    process = checker._process.pid
    assert process is not None
    os.kill(process, signal.SIGKILL)
    checker.check(GOOD)  # known, so it needs no process
    assert checker._process.pid == process
    time.sleep(0.1)
    checker.check(StructuredOutputsParams(regex="[0-9]+"))
    assert checker._process.pid != process


def test_the_bytes_of_a_grammar_grow_with_it(checker: GrammarChecker) -> None:
    small, large = (
        checker.check(StructuredOutputsParams(choice=tuple(f"choice {index}" for index in range(count))))
        for count in (10, 4000)
    )
    assert 1_000 < small < 1_000_000 < large < 100_000_000
    assert checker.check(GOOD) == checker.known(GOOD)


def run(test: Callable[[AsyncGrammarChecker, GrammarChecker], Awaitable[None]]) -> None:
    async def main() -> None:
        checker = new_checker()
        asynchronous = AsyncGrammarChecker(checker)
        try:
            await test(asynchronous, checker)
        finally:
            await asynchronous.close()
        assert checker._process.pid is None

    asyncio.run(main())


def test_a_client_that_leaves_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(asynchronous: AsyncGrammarChecker, checker: GrammarChecker) -> None:
        await asynchronous.check(GOOD)
        leaving = asyncio.create_task(asynchronous.check(SLOW))
        await asyncio.sleep(0.05)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        with pytest.raises(RequestError, match="unclosed group"):
            await asynchronous.check(StructuredOutputsParams(regex="("))
        monkeypatch.setattr(grammar_checker, "MAX_WAITING", 0)
        with pytest.raises(QueueFullError):
            await asynchronous.check(StructuredOutputsParams(regex="x"))
        await asynchronous.check(GOOD)

    run(test)


def test_closing_ends_a_running_check() -> None:
    async def main() -> None:
        asynchronous = AsyncGrammarChecker(new_checker())
        await asynchronous.check(GOOD)
        checking = asyncio.create_task(asynchronous.check(SLOW))
        await asyncio.sleep(0.05)
        await asynchronous.close()
        with pytest.raises(EngineUnavailableError):
            await checking

    asyncio.run(main())


def test_without_a_tokenizer_there_is_a_reason(tmp_path: Path) -> None:
    checker = new_checker(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(RequestError, match=r"needs the model's tokenizer: .* is missing"):
                checker.check(GOOD)
    finally:
        checker.close()
