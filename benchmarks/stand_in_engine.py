"""An engine process that computes nothing: real messages and scheduler, tokens of a fixed text at a fixed pace.

It stands in for `quire.engine.engine_process` where the API process is measured. QUIRE_STAND_IN_STEP is the seconds
that a step takes.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from quire.engine.core import EngineCore
from quire.engine.engine_process import Connection, main
from quire.engine.messages import Load
from quire.engine.tokenizer import load_tokenizer
from quire.grammar.cache import Compiler, GrammarCache
from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan, StepResult

PROGRAM = "benchmarks.stand_in_engine"
STEP_VARIABLE = "QUIRE_STAND_IN_STEP"
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows. "


@dataclass
class _Done:
    """A step that is ready at once."""

    outcome: StepResult
    ready: bool = True

    def result(self) -> StepResult:
        return self.outcome


class StandInExecutor:
    """Gives every sample the next token of the text."""

    has_idle_work = False

    def __init__(self, token_ids: list[int], step_seconds: float) -> None:
        self._token_ids = token_ids
        self._step_seconds = step_seconds
        self._next_step = 0.0

    def launch(self, plan: StepPlan) -> _Done:
        time.sleep(max(0.0, self._next_step - time.monotonic()))
        self._next_step = time.monotonic() + self._step_seconds
        result = StepResult()
        for index in plan.sample_indices:
            position = plan.num_computed_tokens[index] + plan.num_scheduled_tokens[index]
            result.token_ids.append(self._token_ids[position % len(self._token_ids)])
            result.logprobs.append(None)
            result.errors.append(None)
        return _Done(result)

    def prepare(self, *, idle: bool) -> None:
        pass

    def close(self) -> None:
        pass


def stand_in_core(load: Load, connection: Connection) -> EngineCore:
    plan = load.plan
    tokenizer = load_tokenizer(load.config, Path(load.folder))
    assert tokenizer is not None
    limits = SchedulerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
    )
    executor = StandInExecutor(
        tokenizer.encode(TEXT, add_special_tokens=False), float(os.environ.get(STEP_VARIABLE, "0.01"))
    )
    scheduler = Scheduler(BlockPool(plan.num_blocks, plan.block_size, enable_prefix_caching=True), limits)
    grammars = GrammarCache(_no_compiler, 1, 1)
    return EngineCore(scheduler, executor, grammars, None, vocab_size=tokenizer.vocab_size, max_logprobs=5)


def _no_compiler() -> Compiler:
    raise AssertionError("the stand-in has no grammars")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), stand_in_core, lambda: None)
