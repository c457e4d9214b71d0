"""The other ranks of a model, played by processes without one: every plan arrives, and no death goes unseen."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.errors import CheckpointError, DeviceMemoryError
from quire.parallel.rank_group import Pending, RankDeadError, RankedExecutor, RankGroup
from quire.sampling_params import SamplingParams
from quire.step import NewRow, OffloadPlan, RowFork, StepPlan, StepResult

PROGRAM = "tests.parallel.fake_rank"
Start = Callable[..., RankGroup]


class Done:
    ready = True

    def result(self) -> StepResult:
        return StepResult(token_ids=[7])


class OwnRank:
    """Rank 0."""

    has_idle_work = False

    def __init__(self, error: Exception | None = None) -> None:
        self.plans: list[StepPlan] = []
        self.closed = False
        self.error = error

    def launch(self, plan: StepPlan) -> Pending:
        if self.error is not None:
            raise self.error
        self.plans.append(plan)
        return Done()

    def prepare(self, *, idle: bool) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    groups: list[RankGroup] = []

    def start(size: int = 2, on_death: Callable[[str], None] | None = None, **orders: Any) -> RankGroup:
        def encode(rank: int, meeting_file: Path) -> bytes:
            return msgspec.json.encode({"path": str(tmp_path / f"rank{rank}"), **orders})

        group = RankGroup(PROGRAM, size, encode, on_death)
        groups.append(group)
        return group

    yield start
    for group in groups:
        group.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


ROW = NewRow(
    0,
    SamplingParams(temperature=0.3, logit_bias={5: 1.0}),
    [1, 2, 3],
    [4],
    seed=5,
    sample_index=1,
    stop_token_ids=(2,),
    second_text=4,
)
PLANS = [
    StepPlan(rows=[0], num_computed_tokens=[0], num_scheduled_tokens=[3], token_ids=[1, 2, 3], new_rows=[ROW]),
    StepPlan(
        batch_id=3,
        rows=[0, 2],
        token_ids=[~0, 9],
        sample_indices=[0, 1],
        sample_rows=[0, 2],
        drafts={1: [5, 6]},
        row_forks=[RowFork(1, 0, 77)],
        new_blocks=[(0, 1, 3, [4, -1])],
        block_copies=[(2, 3)],
        prompt_logprobs={0: (2, [1, 2])},
        offload=OffloadPlan(
            evicted=[("host", b"\x00" * 32)], stores=[("host", b"\xff" * 32, 4)], loads=[("host", b"a" * 32, 1)]
        ),
    ),
    StepPlan(),
]


def test_every_rank_gets_every_plan_in_order_without_texts(start: Start, tmp_path: Path) -> None:
    group, own = start(3), OwnRank()
    group.wait_loaded()
    executor = RankedExecutor(own, group)
    for plan in PLANS:
        assert executor.launch(plan).result().token_ids == [7]
    assert own.plans == PLANS
    for rank in (1, 2):
        path = tmp_path / f"rank{rank}"
        wait_for(lambda path=path: path.exists() and path.read_bytes().count(b"\n") == len(PLANS))  # type: ignore[misc]
        seen = [msgspec.json.decode(line, type=StepPlan) for line in path.read_bytes().splitlines()]
        assert seen[1:] == PLANS[1:]
        (row,) = seen[0].new_rows
        assert (row.row, row.seed, row.second_text) == (0, 5, 4)
        assert (row.params, row.prompt_token_ids, row.output_token_ids) == (SamplingParams(), [], [])
    pids = group.pids
    executor.close()
    assert own.closed
    assert all(map(is_gone, pids))
    assert not group.meeting_file.parent.exists()


def test_a_rank_that_cannot_load_gives_its_reason(start: Start) -> None:
    with pytest.raises(CheckpointError, match="tensor x is missing"):
        start(fails=True).wait_loaded()
    with pytest.raises(RankDeadError, match=r"rank 1 of 2 died \(exit code 3\)|a rank died while loading"):
        start(exits=True).wait_loaded()


def test_a_dead_rank_is_noticed_without_work_and_ends_the_next_step(start: Start) -> None:
    deaths: list[str] = []
    group = start(on_death=deaths.append)
    group.wait_loaded()
    executor = RankedExecutor(OwnRank(), group)
    executor.launch(PLANS[0])
    os.kill(group.pids[0], signal.SIGKILL)
    wait_for(lambda: bool(deaths))
    assert deaths == ["rank 1 of 2 died (signal SIGKILL)"]
    with pytest.raises(RankDeadError, match="rank 1 of 2 died"):
        executor.launch(PLANS[0])


def test_what_fails_in_a_step(start: Start) -> None:
    group = start()
    group.wait_loaded()
    lost = (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]"), DeviceMemoryError("a step of 5 tokens"))
    for error in lost:
        with pytest.raises(RankDeadError):
            RankedExecutor(OwnRank(error), group).launch(PLANS[0])
    own = RuntimeError("an index is out of range")
    with pytest.raises(RuntimeError) as caught:
        RankedExecutor(OwnRank(own), group).launch(PLANS[0])
    assert caught.value is own


def test_ranks_end_with_rank_0_even_when_they_hang(start: Start, tmp_path: Path) -> None:
    group = start(hangs=True)
    group.wait_loaded()
    wait_for(lambda: (tmp_path / "rank1").exists())
    (pid,) = group.pids
    group.close()
    assert is_gone(pid)
