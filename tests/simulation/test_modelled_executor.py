"""ModelledExecutor: a result of the plan's shape, and what it tells the time model counted token by token."""

from hypothesis import given
from hypothesis import strategies as st

from quire.simulation.modelled_executor import ModelledExecutor
from quire.simulation.step_time import StepTime
from quire.step import StepPlan
from tests.simulation.traces import SLOW, TINY


class Asked(StepTime):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(TINY, SLOW)
        self.asked: tuple[float, ...] = ()

    def seconds(self, *arguments: float) -> float:  # type: ignore[override]
        self.asked = arguments
        return 0.5


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=8), st.integers(0, 8))
def test_work_is_counted_token_by_token(rows: list[tuple[int, int]], num_samples: int) -> None:
    plan = StepPlan(
        rows=list(range(len(rows))),
        num_computed_tokens=[start for start, _ in rows],
        num_scheduled_tokens=[count for _, count in rows],
        token_ids=[0] * sum(count for _, count in rows),
        sample_rows=[0] * num_samples,
        sample_indices=[0] * num_samples,
    )
    step_time = Asked()
    result, seconds = ModelledExecutor(step_time).execute(plan)
    pairs = sum(start + place + 1 for start, count in rows for place in range(count))
    read = sum(start + count for start, count in rows)
    assert step_time.asked == (len(rows), plan.num_tokens, read, pairs, num_samples)
    assert seconds == 0.5
    assert len(result.token_ids) == len(result.errors) == len(result.logprobs) == num_samples


def test_each_vector_that_a_plan_asks_for_has_a_result() -> None:
    plan = StepPlan(
        rows=[0, 1], num_computed_tokens=[0, 0], num_scheduled_tokens=[1, 2], token_ids=[0] * 3, pool_rows=[1]
    )
    assert ModelledExecutor(Asked()).execute(plan)[0].vectors == {1: b""}
