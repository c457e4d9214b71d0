"""The simulator decides what the engine decides: same arrivals, same step times, the same StepPlans to the last block.

The engine runs a real model. Its clock is the sum of what its steps took; the simulation is told those times and
nothing else. They meet at the seam that both have: who executes a plan.
"""

import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.engine import build
from quire.engine.checkpoint import bundled_folder
from quire.engine.memory_plan import plan_memory
from quire.model_config import ModelConfig
from quire.request import Request
from quire.runner.model_runner import ModelRunner, PendingStep
from quire.sampling_params import SamplingParams
from quire.scheduler import length_curve
from quire.scheduler.scheduler import Scheduler
from quire.simulation.arrivals import arrivals_of
from quire.simulation.measures import Measures
from quire.simulation.modelled_executor import ModelledExecutor
from quire.simulation.paged import PagedSimulation
from quire.simulation.settings import SimulationSettings
from quire.simulation.step_time import StepTime
from quire.simulation.trace import Trace, TraceRow
from quire.step import StepPlan, StepResult
from tests.simulation.traces import SLOW, TINY

END_TOKENS = tuple(range(40))
"""As many of the bundled model's as let a sample end after some dozen tokens."""
NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS, MAX_TOKENS, MAX_LEN = 48, 16, 12, 64, 256


@dataclass
class Recording:
    """What was decided, what each step took, and the clock that follows from it."""

    now: float = 0.0
    seconds: list[float] = field(default_factory=list)
    plans: list[tuple[Any, ...]] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)
    """Request → tokens that it was given, of its last sample that ended."""

    def note(self, plan: StepPlan) -> None:
        """Which sequences compute what where; not which tokens, which a simulation does not know."""
        self.plans.append(
            (
                [*plan.rows],
                [*plan.num_computed_tokens],
                [*plan.num_scheduled_tokens],
                [*plan.sample_indices],
                [*plan.sample_rows],
                [(row, group, first, [*blocks]) for row, group, first, blocks in plan.new_blocks],
                [*plan.block_copies],
                [(new.row, len(new.prompt_token_ids), len(new.output_token_ids)) for new in plan.new_rows],
            )
        )


def run_engine(
    rows: list[TraceRow], monkeypatch: pytest.MonkeyPatch, *, n: int = 1, ends: bool = False, **policies: str
) -> Recording:
    """With `ends` the model may end a sample before its limit, at a token drawn of nearly all there are."""
    recording = Recording()

    class RecordingRunner(ModelRunner):
        def launch(self, plan: StepPlan) -> PendingStep:
            recording.note(plan)
            started = time.perf_counter()
            pending = super().launch(plan)
            pending.result()  # the scheduler hears of it when the clock says so, as in a simulation
            recording.seconds.append(time.perf_counter() - started)
            recording.now += recording.seconds[-1]
            return pending

    monkeypatch.setattr(build, "ModelRunner", RecordingRunner)
    monkeypatch.setattr(build, "Scheduler", partial(Scheduler, clock=lambda: recording.now))
    config = EngineConfig(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        max_model_len=MAX_LEN,
        threads=1,
        **policies,
    )
    model_config = ModelConfig.from_folder(bundled_folder())
    plan = plan_memory(config, model_config)
    core = build.build_core(config, model_config, plan, bundled_folder(), lambda name, seconds: None)
    draw, waiting = random.Random(0), list(enumerate(rows))
    while waiting or core.has_work:
        while waiting and (waiting[0][1].arrival or 0.0) <= recording.now:
            number, row = waiting.pop(0)
            core.add(
                Request(
                    request_id=str(number),
                    # No two begin alike: what a cache finds by accident is not in the trace.
                    prompt_token_ids=[3 + number, *(draw.randint(3, 900) for _ in range(row.prompt_tokens - 1))],
                    # So hot that two samples of a prompt part at once, as they do in a simulation, which has no text:
                    # a block that they began alike would be found when one of them comes back.
                    params=SamplingParams(
                        n=n,
                        temperature=100.0,
                        max_tokens=row.output_tokens,
                        ignore_eos=True,
                        seed=number,
                        stop_token_ids=END_TOKENS if ends else (),
                    ),
                    max_tokens=row.output_tokens,
                    arrival_time=row.arrival or 0.0,
                    tenant=row.tenant,
                )
            )
        if not core.has_work:
            recording.now = max(recording.now, waiting[0][1].arrival or 0.0)
            continue
        for delta in core.step():
            num_tokens = len(delta.token_ids)
            recording.lengths[delta.request_id] = recording.lengths.get(delta.request_id, 0) + num_tokens
    core.close()
    return recording


def run_simulation_of(
    rows: list[TraceRow], seconds: list[float], *, n: int = 1, **policies: str
) -> tuple[Recording, dict[str, Any]]:
    recording = Recording()
    times = iter(seconds)

    class ReplayedTimes(ModelledExecutor):
        def execute(self, plan: StepPlan, now: float = 0.0) -> tuple[StepResult, float]:
            recording.note(plan)
            return super().execute(plan, now)[0], next(times)

    settings = SimulationSettings(
        trace="made",
        n=n,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        **policies,  # type: ignore[arg-type]  # names of policies are texts
    )
    simulation = PagedSimulation(
        arrivals_of(Trace("made", rows), settings),
        ReplayedTimes(StepTime(TINY, SLOW)),
        Measures(NUM_BLOCKS * BLOCK_SIZE, of_allocated=True, ttft_limit=1.0, tbt_limit=1.0),
        settings,
        num_slots=NUM_BLOCKS * BLOCK_SIZE,
        max_model_len=MAX_LEN,
    )
    simulation.run()
    return recording, simulation.result()


@pytest.mark.parametrize("n", [1, 2])
def test_simulator_and_engine_make_the_same_plans(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a load that waits, preempts and comes back: prompts longer than a step, a pool too small for all."""
    draw = random.Random(n)
    rows = [TraceRow(draw.randint(1, 150), draw.randint(1, 60), 0.0)]
    while len(rows) < 24:
        # A third of them at once, the rest while others run.
        gap = 0.0 if len(rows) < 8 else draw.expovariate(100.0)
        rows.append(TraceRow(draw.randint(1, 150), draw.randint(1, 60), (rows[-1].arrival or 0.0) + gap))
    engine = run_engine(rows, monkeypatch, n=n)
    simulated, figures = run_simulation_of(rows, engine.seconds, n=n)
    assert figures["finished"] == len(rows)
    assert figures["preemptions"] > 0
    assert_same_plans(simulated, engine)


@pytest.mark.parametrize(
    ("policy", "admission"), [("fcfs", "predicted"), ("shortest", "current"), ("fair", "predicted")]
)
def test_each_policy_decides_alike_where_the_model_ends_answers(
    policy: str, admission: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What policies learn from is the same, too: who ended when, by itself or at its limit, and of which tenant.

    How long each answer is the engine shows; clients only say how long it may be.
    """
    monkeypatch.setattr(length_curve, "MIN_ANSWERS", 6)
    draw = random.Random(5)
    rows = []
    for number in range(40):
        arrival = 0.0 if number < 16 else (rows[-1].arrival or 0.0) + draw.expovariate(150.0)
        limit = draw.choice((16, 60, 100))
        rows.append(TraceRow(draw.randint(1, 100), limit, arrival, tenant="greedy" if number % 4 else "modest"))
    engine = run_engine(rows, monkeypatch, ends=True, scheduling_policy=policy, admission=admission)
    told = [
        row._replace(output_tokens=engine.lengths[str(number)], max_tokens=row.output_tokens)
        for number, row in enumerate(rows)
    ]
    num_ended = sum(row.output_tokens < (row.max_tokens or 0) for row in told)
    assert 10 < num_ended < 38, "some end by themselves, some at their limit"
    simulated, figures = run_simulation_of(told, engine.seconds, scheduling_policy=policy, admission=admission)
    assert figures["finished"] == len(rows)
    assert_same_plans(simulated, engine)
    first_come, _ = run_simulation_of(told, [*engine.seconds, *[0.01] * 1000])
    assert first_come.plans != simulated.plans, "the policy makes a difference here"


def assert_same_plans(simulated: Recording, engine: Recording) -> None:
    assert len(simulated.plans) == len(engine.plans)
    for step, (mine, theirs) in enumerate(zip(simulated.plans, engine.plans, strict=True)):
        assert mine == theirs, f"step {step}"
