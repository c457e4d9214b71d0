"""GrammarDoor: every answer within a second, whatever the grammar does to the process that compiles it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from quire.engine import grammar_door
from quire.engine.checkpoint import bundled_folder
from quire.engine.grammar_door import GrammarDoor
from quire.errors import QueueFullError, RequestError
from quire.structured_outputs import StructuredOutputsParams

GOOD = StructuredOutputsParams(regex="[a-z]+")
SLOW = StructuredOutputsParams(json={"type": "integer", "multipleOf": 999983})
"""Within llguidance's limits, and seconds to compile."""


def run(test: Callable[[GrammarDoor], Awaitable[None]], folder: Path | None = None) -> None:
    async def main() -> None:
        door = GrammarDoor(str(folder or bundled_folder()), vocab_size=1024, eos_token_ids=(1,))
        try:
            await test(door)
        finally:
            await door.close()

    asyncio.run(main())


def test_good_passes_bad_is_refused_and_the_process_stays() -> None:
    async def test(door: GrammarDoor) -> None:
        await door.check(GOOD)
        process = door._process
        for bad, reason in (
            (StructuredOutputsParams(regex="("), "unclosed group"),
            (StructuredOutputsParams(json={"type": "strnig"}), "json cannot be compiled"),
        ):
            started = time.monotonic()
            with pytest.raises(RequestError, match=reason) as refused:
                await door.check(bad)
            assert time.monotonic() - started < 1
            assert (refused.value.status, refused.value.code) == (400, "invalid_grammar")
        await door.check(StructuredOutputsParams(json_object=True))
        assert door._process is process

    run(test)


def test_an_explosion_ends_within_a_second_and_the_next_grammar_is_checked() -> None:
    async def test(door: GrammarDoor) -> None:
        await door.check(GOOD)
        started = time.monotonic()
        with pytest.raises(RequestError, match=r"takes more than 0\.7 s to compile"):
            await door.check(SLOW)
        assert time.monotonic() - started < 1
        await door.check(GOOD)  # known, so it needs no process
        await door.check(StructuredOutputsParams(regex="[0-9]+"))

    run(test)


def test_a_process_that_dies_refuses_the_grammar_it_died_of() -> None:
    async def test(door: GrammarDoor) -> None:
        await door.check(GOOD)
        assert door._process is not None
        door._process.kill()
        with pytest.raises(RequestError, match="takes more than can be compiled"):
            await door.check(SLOW)
        await door.check(StructuredOutputsParams(regex="[0-9]+"))

    run(test)


def test_a_client_that_leaves_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(door: GrammarDoor) -> None:
        await door.check(GOOD)
        leaving = asyncio.create_task(door.check(SLOW))
        await asyncio.sleep(0.05)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        with pytest.raises(RequestError, match="unclosed group"):
            await door.check(StructuredOutputsParams(regex="("))
        monkeypatch.setattr(grammar_door, "MAX_WAITING", 0)
        with pytest.raises(QueueFullError):
            await door.check(StructuredOutputsParams(regex="x"))
        await door.check(GOOD)

    run(test)


def test_without_a_tokenizer_there_is_a_reason(tmp_path: Path) -> None:
    async def test(door: GrammarDoor) -> None:
        for _ in range(2):
            with pytest.raises(RequestError, match=r"needs the model's tokenizer\.json"):
                await door.check(GOOD)

    run(test, tmp_path)
