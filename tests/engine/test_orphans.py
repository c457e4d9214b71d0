"""The process that answers clients is killed: its engines end, whatever they do at that moment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import asyncio, os, sys
from quire import AsyncLLM, EngineConfig, SamplingParams
from quire.engine import engine_child
from quire.engine.chat_template_process import ChatTemplateProcess
from quire.engine.grammar_checker import AsyncGrammarChecker
from tests.engine.serving import OPTIONS, until

engine_child.PROGRAM = "tests.engine.scripted_process"
ChatTemplateProcess.warm = AsyncGrammarChecker.warm = lambda self: None
fault_file = os.environ["QUIRE_TEST_LOAD_FAULT"]

async def engine(kind):
    started = AsyncLLM(EngineConfig.from_options(OPTIONS))
    if kind == "spin while loading":
        open(fault_file, "w").write("spin")
        await started.start()
        return started
    await started.start()
    await started.wait_ready()
    if kind != "idle":
        params = SamplingParams(max_tokens=40, ignore_eos=True, extra={"fault": kind, "at": "3"})
        async def ask():
            async for _ in started.generate([5, 6], params):
                pass
        started.task = asyncio.create_task(ask())
        await asyncio.sleep(0.3)
    return started

async def main():
    kept = [await engine(kind) for kind in ("idle", "idle", "hang", "spin while loading")]
    print(*(each.engine_pid for each in kept), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""
ORPHAN_SECONDS = 0.5


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_engines_end_with_the_process_that_answers(tmp_path: Path) -> None:
    """Stopped, idle, in a step that blocks, and in a load that turns in a loop."""
    variables = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "QUIRE_TEST_LOAD_FAULT": str(tmp_path / "fault"),
        "QUIRE_TEST_ORPHAN_SECONDS": str(ORPHAN_SECONDS),
    }
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 4
        assert all(map(lives, pids))
        os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
    deadline = time.monotonic() + 60
    try:
        while any(map(lives, pids)):
            assert time.monotonic() < deadline, f"alive: {[number for number, pid in enumerate(pids) if lives(pid)]}"
            time.sleep(0.02)
    finally:
        for pid in filter(lives, pids):
            os.kill(pid, signal.SIGKILL)
