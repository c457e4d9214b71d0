"""EngineCore with a scripted executor in the place of the model runner: no model, no tensors."""

from collections import deque
from collections.abc import Iterator

import pytest

from quire.engine.core import EngineCore
from quire.engine.executor import Executor
from quire.errors import DeviceMemoryError, RequestError
from quire.grammar.cache import GrammarCache
from quire.kv_cache.block_pool import BlockPool
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan, StepResult


class Step:
    """A launched step, ready at once or when its result is read."""

    def __init__(self, executor: "ScriptedExecutor", plan: StepPlan, ready: bool) -> None:
        self._executor = executor
        self._plan = plan
        self.ready = ready

    def result(self) -> StepResult:
        self._executor.log.append("result")
        count = len(self._plan.sample_rows)
        return StepResult(
            [self._executor.next_token(row) for row in self._plan.sample_rows], [None] * count, [None] * count
        )


class ScriptedExecutor:
    """Samples 100, 101, 102 … for each row, and records what it is asked to do."""

    def __init__(self, *, ready: bool = True, failures: int = 0) -> None:
        self.log: list[str] = []
        self.plans: list[StepPlan] = []
        self.has_idle_work = False
        self._ready = ready
        self._failures = failures
        self._tokens: dict[int, Iterator[int]] = {}

    def next_token(self, row: int) -> int:
        return next(self._tokens.setdefault(row, iter(range(100, 200))))

    def launch(self, plan: StepPlan) -> Step:
        if self._failures:
            self._failures -= 1
            raise DeviceMemoryError("scripted")
        self.log.append("launch")
        self.plans.append(plan)
        for new in plan.new_rows:
            self._tokens.pop(new.row, None)
        return Step(self, plan, self._ready)

    def prepare(self, *, idle: bool) -> None:
        self.log.append("prepare idle" if idle else "prepare")
        self.has_idle_work = False

    def close(self) -> None:
        self.log.append("close")


def make_core(executor: Executor, *, overlaps: bool = False) -> EngineCore:
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=200)
    scheduler = Scheduler(BlockPool(40, 16, enable_prefix_caching=True), limits)
    grammars = GrammarCache(lambda: pytest.fail("no grammars"), 1, 1)
    return EngineCore(scheduler, executor, grammars, None, vocab_size=300, max_logprobs=5, overlaps=overlaps)


def request(name: str, num_prompt: int, max_tokens: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1 + index % 90 for index in range(num_prompt)],
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        max_tokens=max_tokens,
    )


def run(core: EngineCore) -> dict[str, list[int]]:
    """Step until nothing is left; the tokens of each request."""
    tokens: dict[str, list[int]] = {}
    steps = deque(range(500))
    while core.has_work:
        steps.pop()
        for delta in core.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens


@pytest.mark.parametrize("overlaps", [False, True])
def test_requests_run_to_their_end(overlaps: bool) -> None:
    executor = ScriptedExecutor(ready=not overlaps)
    core = make_core(executor, overlaps=overlaps)
    core.add(request("a", 100, 7))  # more than one step's budget
    core.add(request("b", 5, 3))
    assert run(core) == {"a": list(range(100, 107)), "b": [100, 101, 102]}
    assert sum(plan.num_tokens for plan in executor.plans) == 100 + 6 + 5 + 2
    assert core.stats().num_used_blocks == 0
    ahead = any(executor.log[i : i + 2] == ["launch", "launch"] for i in range(len(executor.log)))
    assert ahead == overlaps, "the next step is launched before a result that is not ready is read"
    core.close()
    assert executor.log[-1] == "close"
    core.close()
    assert executor.log.count("close") == 1


def test_a_step_without_memory_is_planned_again() -> None:
    executor = ScriptedExecutor(failures=2)
    core = make_core(executor)
    core.add(request("a", 60, 2))
    assert run(core) == {"a": [100, 101]}
    assert executor.plans[0].num_tokens == 15, "each failure halves the step"


def test_no_memory_for_one_token_is_the_end() -> None:
    core = make_core(ScriptedExecutor(failures=99))
    core.add(request("a", 60, 2))
    with pytest.raises(DeviceMemoryError):
        run(core)


def test_an_aborted_request_and_a_refused_one() -> None:
    executor = ScriptedExecutor()
    core = make_core(executor)
    core.add(request("a", 10, 50))
    with pytest.raises(RequestError, match="vocabulary ends at 299"):
        core.add(Request(request_id="b", prompt_token_ids=[300], params=SamplingParams(), max_tokens=1))
    with pytest.raises(
        RequestError,
        match=r"the prompt has 200 tokens, but .*maximum context length is 200 tokens, output included",
    ):
        core.add(request("b", 200, 1))
    core.step()
    core.abort("a")
    assert not core.has_work
    assert core.stats().num_used_blocks == 0


def test_preparations_run_between_steps_and_without_work() -> None:
    executor = ScriptedExecutor()
    core = make_core(executor)
    executor.has_idle_work = True
    assert core.has_idle_work
    core.step()
    assert executor.log == ["prepare idle"]
    assert not core.has_idle_work
    core.add(request("a", 10, 1))
    core.step()
    assert executor.log[1:] == ["launch", "prepare", "result"]


def test_a_registered_prefix_is_computed_and_held() -> None:
    core = make_core(ScriptedExecutor())
    core.register_prefix("p", list(range(1, 33)), ("",))
    while core.has_work:
        core.step()
    assert core.holds_prefix("p")
    assert core.stats().num_pinned_blocks == 2
    core.unregister_prefix("p")
    assert core.stats().num_pinned_blocks == 0
