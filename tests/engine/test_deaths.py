"""Deaths of the engine process: who pays, who is blamed, and what the process that answers clients says meanwhile.

The engine process is scripted, so that it starts in a moment; `test_async_engine` kills real ones.
"""

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from quire import AsyncLLM, EngineConfig, SamplingParams
from quire.engine import engine_child, engine_client, spare_child
from quire.engine.breaker import Breaker
from quire.engine.chat_template_process import ChatTemplateProcess
from quire.engine.grammar_checker import AsyncGrammarChecker
from quire.engine.group_signals import GROUP_SIGNALS
from quire.errors import (
    CheckpointError,
    DeadlineError,
    EngineDeadError,
    EngineUnavailableError,
    QuarantinedError,
    QuireError,
)
from tests.engine import scripted_process, serving
from tests.engine.serving import OPTIONS, collect, until

PLAIN = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPTS = [[number] * (3 + 40 * number) for number in range(5, 11)]


@pytest.fixture(autouse=True)
def load_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose text is what happens to processes that load."""
    monkeypatch.setattr(engine_child, "PROGRAM", scripted_process.PROGRAM)
    for process in (
        AsyncGrammarChecker,
        ChatTemplateProcess,
    ):  # takes longer than a test
        monkeypatch.setattr(process, "warm", lambda self: None)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("QUIRE_TEST_LOAD_FAULT", str(tmp_path / "fault"))
    return tmp_path / "fault"


def run(test: Callable[[AsyncLLM], Awaitable[None]], **options: Any) -> None:
    serving.run(test, **options)


def fault(kind: str, at: int = 0, **changes: Any) -> SamplingParams:
    return PLAIN.with_changes(extra={"fault": kind, "at": str(at)}, **changes)


async def innocent(engine: AsyncLLM, prompt: list[int], params: SamplingParams = PLAIN) -> None:
    """Ask, and check every token."""
    output = await collect(engine, prompt, params)
    for sample in output.outputs:
        assert sample.token_ids == scripted_process.expected(prompt, sample.index, params.max_tokens or 0)


async def all_innocent(engine: AsyncLLM) -> None:
    await asyncio.gather(
        *(innocent(engine, prompt) for prompt in PROMPTS),
        innocent(engine, [7] * 30, PLAIN.with_changes(n=3)),
    )


def test_only_the_requests_that_kill_are_ended_and_then_refused() -> None:
    faults = [fault("die"), fault("raise", 7)]

    async def test(engine: AsyncLLM) -> None:
        killers = [asyncio.create_task(collect(engine, [99 + at], params)) for at, params in enumerate(faults)]
        await all_innocent(engine)
        for killer in killers:
            with pytest.raises(QuarantinedError, match=r"this request \(r\d+\), at last .*: it .*ended.* for 600 s"):
                await killer
        for at, params in enumerate(faults):
            with pytest.raises(QuarantinedError, match=r"died whenever .* it is refused for \d+ s more"):
                await collect(engine, [99 + at], params.with_changes(seed=3))
        await innocent(engine, [99])
        await until(lambda: engine.stats.num_used_blocks == 0)

    run(test)


def test_kills_from_outside_and_during_loads_blame_nobody() -> None:
    """Every kill comes after some tokens, or while the next process loads."""

    async def test(engine: AsyncLLM) -> None:
        streams = asyncio.create_task(all_innocent(engine))
        for _ in range(4):
            steps = engine.stats.total_steps
            await until(lambda steps=steps: engine.stats.total_steps not in (0, steps))  # type: ignore[misc]
            for _ in range(2):
                pid = engine.engine_pid
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: engine.engine_pid != pid)  # type: ignore[misc]
            await until(lambda: engine.state == "ready")
        await streams

    run(test)


def test_an_engine_that_does_not_advance_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that spins dies in the time in which one that sleeps does."""
    monkeypatch.setattr(engine_client, "step_allowance", lambda plan: 0.0)  # a scripted step computes nothing

    async def test(engine: AsyncLLM) -> None:
        beside = asyncio.create_task(all_innocent(engine))
        faulty = [collect(engine, [99 + at], fault(kind, 2)) for at, kind in enumerate(("hang", "stop", "spin"))]
        for end in await asyncio.gather(*faulty, return_exceptions=True):
            assert isinstance(end, QuarantinedError)
            assert re.search(r"suspect: a step did not end in \d+ s", str(end))
        await beside

    run(test, step_timeout=0.4)


def test_an_idle_engine_that_was_stopped_is_replaced_when_a_request_comes() -> None:
    async def test(engine: AsyncLLM) -> None:
        pid = engine.engine_pid
        for number in GROUP_SIGNALS:  # they are left to the process that answers clients
            os.kill(pid, number)
        await innocent(engine, [5])
        assert engine.engine_pid == pid
        os.kill(pid, signal.SIGSTOP)
        await all_innocent(engine)
        assert engine.engine_pid != pid

    run(test, step_timeout=0.5)


def test_a_late_request_ends_and_frees_its_memory() -> None:
    async def test(engine: AsyncLLM) -> None:
        beside = asyncio.create_task(all_innocent(engine))
        with pytest.raises(DeadlineError, match=r"not finished within its 0\.05 seconds"):
            await collect(engine, [5], PLAIN.with_changes(max_tokens=1000), timeout=0.05)
        await beside
        await until(lambda: engine.stats.num_used_blocks == 0)

    run(test)


def test_a_deadline_holds_while_no_engine_lives(load_fault: Path) -> None:
    async def test(engine: AsyncLLM) -> None:
        task = asyncio.create_task(collect(engine, [5], PLAIN.with_changes(max_tokens=1000), timeout=0.7))
        await until(lambda: engine.stats.num_running == 1)
        load_fault.write_text("die")
        os.kill(engine.engine_pid, signal.SIGKILL)
        with pytest.raises(DeadlineError):
            await task
        load_fault.unlink()
        await innocent_when_up(engine)

    run(test)


def test_replacements_that_die_come_later_and_later_while_requests_wait(load_fault: Path) -> None:
    async def test(engine: AsyncLLM) -> None:
        streams = asyncio.create_task(all_innocent(engine))
        await until(lambda: engine.stats.total_generated_tokens > 20)
        load_fault.write_text("die")
        os.kill(engine.engine_pid, signal.SIGKILL)
        for kind, num_deaths, delay in (("fail", 2, 1), ("", 3, 2)):
            await until(lambda n=num_deaths: engine.outage is not None and f"{n} times" in str(engine.outage))  # type: ignore[misc]
            said = rf"died {num_deaths} times without computing anything: .* in {delay} s"
            with pytest.raises(EngineUnavailableError, match=said) as no:
                await collect(engine, [5], PLAIN)
            assert no.value.retry_after == delay
            assert not engine.advances
            load_fault.write_text(kind)
        await streams
        assert engine.advances

    run(test)


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("die", EngineDeadError, "died while loading: it was ended by SIGKILL"),
        ("stop", EngineDeadError, "died while loading: loading made no progress in 1 s"),
        ("spin", EngineDeadError, r"died while loading: loading made no progress in \d s"),
        ("fail", CheckpointError, "the model folder is gone"),
    ],
)
def test_a_first_load_that_fails_is_reported_with_its_cause(
    load_fault: Path, kind: str, error: type[QuireError], said: str
) -> None:
    load_fault.write_text(kind)

    async def main() -> None:
        engine = AsyncLLM(EngineConfig.from_options({**OPTIONS, "load_timeout": 1.0}))
        try:
            await engine.start()
            await engine.wait_ready()
        finally:
            await engine.shutdown()

    with pytest.raises(error, match=said):
        asyncio.run(main())


def test_a_shutdown_at_the_moment_of_a_death_finishes_what_runs(load_fault: Path) -> None:
    async def test(engine: AsyncLLM) -> None:
        streams = asyncio.create_task(all_innocent(engine))
        await until(lambda: engine.stats.total_generated_tokens > 20)
        os.kill(engine.engine_pid, signal.SIGKILL)
        await engine.shutdown(drain_seconds=30)
        await streams

    run(test)


def test_a_shutdown_ends_while_no_engine_can_be_started(load_fault: Path) -> None:
    async def test(engine: AsyncLLM) -> None:
        task = asyncio.create_task(collect(engine, [5], PLAIN.with_changes(max_tokens=1000)))
        await until(lambda: engine.stats.num_running == 1)
        load_fault.write_text("die")
        os.kill(engine.engine_pid, signal.SIGKILL)
        await until(lambda: engine.state == "down")
        await engine.shutdown(drain_seconds=0.1)
        with pytest.raises(EngineUnavailableError, match="shutting down"):
            await task

    run(test)


def test_a_registered_prefix_is_kept_through_deaths() -> None:
    async def test(engine: AsyncLLM) -> None:
        await engine.register_prefix([9] * 64)
        for _ in range(2):
            await until(lambda: engine.stats.num_pinned_blocks == 4)
            os.kill(engine.engine_pid, signal.SIGKILL)
            await until(lambda: engine.state == "restarting")
            await until(lambda: engine.state == "ready")
            await innocent(engine, [5])

    run(test)


def test_a_spare_replaces_a_dead_engine_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_child, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(spare_child, "MAX_DELAY", 0.0)

    async def test(engine: AsyncLLM) -> None:
        spare = engine._client._spare

        async def next_pid(before: int = 0) -> int:
            await until(lambda: spare._child is not None and spare._child.pid != before and spare._child.is_idle)
            assert spare._child is not None
            return spare._child.pid

        pid = await next_pid()
        os.kill(pid, signal.SIGKILL)  # one that died is replaced
        pid = await next_pid(pid)
        os.kill(engine.engine_pid, signal.SIGKILL)
        await all_innocent(engine)
        assert engine.engine_pid == pid
        pid = await next_pid()
        os.kill(pid, signal.SIGSTOP)  # one that was stopped would load for ever
        await until(lambda: spare._child is not None and spare._child.is_stopped)
        os.kill(engine.engine_pid, signal.SIGKILL)
        await all_innocent(engine)
        assert engine.engine_pid != pid
        await until(lambda: not spare._dying)

    run(test, spare=True)


def test_a_process_that_the_system_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and its spare alike: descriptors, processes and threads come back."""
    monkeypatch.setattr(spare_child, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(spare_child, "MAX_DELAY", 0.0)
    monkeypatch.setattr(engine_client, "Breaker", QuickBreaker)
    spawn, num_refused = engine_child.EngineChild.spawn, 0
    errors = [OSError(24, "Too many open files"), RuntimeError("can't start new thread"), BlockingIOError(11, "again")]

    async def scarce() -> engine_child.EngineChild:
        nonlocal num_refused
        if num_refused < 3:
            num_refused += 1
            raise errors[num_refused - 1]
        return await spawn()

    async def test(engine: AsyncLLM) -> None:
        nonlocal num_refused
        spare = engine._client._spare
        await until(lambda: spare._child is not None and spare._child.is_idle)
        monkeypatch.setattr(engine_child.EngineChild, "spawn", scarce)
        assert spare._child is not None
        os.kill(spare._child.pid, signal.SIGKILL)
        await until(lambda: num_refused == 3 and spare._child is not None and spare._child.is_idle)
        num_refused = 0
        taken = spare.take()
        assert taken is not None
        await taken.end()
        os.kill(engine.engine_pid, signal.SIGKILL)
        await all_innocent(engine)
        assert num_refused == 3

    run(test, spare=True)


class QuickBreaker(Breaker):
    """Counts and does not wait."""

    def count_death(self, *, progress: bool) -> float:
        super().count_death(progress=progress)
        return 0.0


async def innocent_when_up(engine: AsyncLLM) -> None:
    await until(lambda: engine.state == "ready")
    await innocent(engine, [5])


def test_a_viewer_of_the_pool_sees_the_pause_and_then_the_new_pool() -> None:
    async def test(engine: AsyncLLM) -> None:
        viewer, states, shapes = engine.views.open(), [], 0
        answer = asyncio.create_task(collect(engine, [7] * 40, PLAIN.with_changes(max_tokens=300)))
        killed = False
        while not (answer.done() and shapes == 2):
            frame = await asyncio.wait_for(viewer.next(), 60)
            states.append(frame.state)
            shapes += frame.shape is not None
            if frame.requests and not killed:
                killed = True
                os.kill(engine.engine_pid, signal.SIGKILL)
        assert "restarting" in states
        assert states[-1] == "ready"
        assert len((await answer).outputs[0].token_ids) == 300
        viewer.close()

    run(test)
