"""An engine process without torch and without a model, which starts in a moment: the real messages, the real scheduler.

A sample's token is a function of prompt, sample index and position, as with a real model and a seed. A request with
`extra={"fault": kind, "at": number of output tokens}` ends, stops, blocks or breaks the process at that token.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from quire.engine import engine_process
from quire.engine.core import EngineCore
from quire.engine.engine_process import Connection, main
from quire.engine.messages import Load
from quire.errors import CheckpointError
from quire.grammar.cache import Compiler, GrammarCache
from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import NewRow, StepPlan, StepResult

PROGRAM = "tests.engine.scripted_process"
engine_process.ORPHAN_SECONDS = float(os.environ.get("QUIRE_TEST_ORPHAN_SECONDS", engine_process.ORPHAN_SECONDS))
STEP_SECONDS = float(os.environ.get("QUIRE_TEST_STEP_SECONDS", "0.002"))


def token(prompt: list[int], sample_index: int, position: int) -> int:
    """The token after `position` tokens."""
    return 5 + (sum(prompt) * 31 + sample_index * 7 + position * 13) % 200


def expected(prompt: list[int], sample_index: int, count: int) -> list[int]:
    """The first `count` tokens of a sample."""
    return [token(prompt, sample_index, len(prompt) + at) for at in range(count)]


@dataclass
class ScriptedStep:
    """A step that is ready at once."""

    outcome: StepResult
    ready: bool = True

    def result(self) -> StepResult:
        return self.outcome


class ScriptedExecutor:
    """Computes nothing and takes `STEP_SECONDS` for it."""

    has_idle_work = False

    def __init__(self) -> None:
        self._rows: dict[int, NewRow] = {}

    def launch(self, plan: StepPlan) -> ScriptedStep:
        time.sleep(STEP_SECONDS)
        self._rows.update({new.row: new for new in plan.new_rows})
        result = StepResult()
        for index, row in zip(plan.sample_indices, plan.sample_rows, strict=True):
            new = self._rows[row]
            position = plan.num_computed_tokens[index] + plan.num_scheduled_tokens[index]
            break_down(new, position - len(new.prompt_token_ids))
            result.token_ids.append(token(new.prompt_token_ids, new.sample_index, position))
            result.logprobs.append(None)
            result.errors.append(None)
        return ScriptedStep(result)

    def prepare(self, *, idle: bool) -> None:
        pass

    def close(self) -> None:
        pass


def break_down(row: NewRow, num_output_tokens: int) -> None:
    """The fault that a request asks for, if it has come so far."""
    if num_output_tokens < int(row.params.extra.get("at", 0)):
        return
    match row.params.extra.get("fault"):
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(1000)
        case "spin":
            while True:
                pass
        case "raise":
            raise RuntimeError("a fault outside any sample")


def scripted_core(load: Load, connection: Connection) -> EngineCore:
    """Dies, stops, spins or fails while loading if the file QUIRE_TEST_LOAD_FAULT says so."""
    fault = Path(os.environ.get("QUIRE_TEST_LOAD_FAULT", "/nowhere"))
    match fault.read_text() if fault.exists() else "":
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "spin":
            while True:
                pass
        case "fail":
            raise CheckpointError("the model folder is gone")
    plan = load.plan
    limits = SchedulerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
    )
    scheduler = Scheduler(BlockPool(plan.num_blocks, plan.block_size, enable_prefix_caching=True), limits)
    return EngineCore(
        scheduler, ScriptedExecutor(), GrammarCache(no_compiler, 1, 1), None, vocab_size=512, max_logprobs=5
    )


def no_compiler() -> Compiler:
    raise AssertionError("no grammars here")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), scripted_core, lambda: None)
