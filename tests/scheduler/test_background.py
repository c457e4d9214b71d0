"""Requests of the background: they run while no client waits for a first token."""

import pytest

from quire.request import BACKGROUND
from quire.scheduler.background_pace import ABOUT_SECONDS, MIN_SHARED_TOKENS, MIN_TOKENS, BackgroundPace
from tests.scheduler.checked_engine import Engine, new_request


def rows_of(engine: Engine) -> set[str]:
    return {group.request.request_id for group in engine.scheduler._queues.running}


def test_the_background_runs_while_nobody_waits() -> None:
    engine = Engine(num_blocks=64)
    for name in ("b1", "b2"):
        engine.add(new_request(name, 8, max_tokens=20, priority=BACKGROUND))
    engine.step()
    engine.step()
    assert rows_of(engine) == {"b1", "b2"}
    engine.add(new_request("client", 8, max_tokens=4))
    plan = engine.step()
    # The client's prompt has the step for itself; the background goes on once it has its first token.
    assert (plan.num_scheduled_tokens, rows_of(engine)) == ([8], {"client"})
    engine.step()
    assert rows_of(engine) == {"client", "b1", "b2"}
    assert engine.scheduler._queues.by_id["b1"].num_preemptions == 1


def test_it_resumes_from_the_cache_and_loses_less_than_a_block() -> None:
    engine = Engine(num_blocks=64)
    engine.add(new_request("b", 18, max_tokens=20, priority=BACKGROUND))
    for _ in range(5):
        engine.step()
    engine.add(new_request("client", 8, max_tokens=1))
    engine.step()
    plan = engine.step()
    (computed,) = plan.num_computed_tokens
    assert 22 - computed <= engine.pool.block_size


def test_without_a_cache_it_keeps_its_memory() -> None:
    engine = Engine(num_blocks=64, enable_prefix_caching=False)
    engine.add(new_request("b", 8, max_tokens=20, priority=BACKGROUND))
    engine.step()
    engine.add(new_request("client", 8, max_tokens=4))
    assert len(engine.step().rows) == 2
    engine.add(new_request("later", 8, max_tokens=20, priority=BACKGROUND))
    engine.add(new_request("client 2", 8, max_tokens=4))
    engine.step()
    assert "later" not in rows_of(engine)


def test_it_ends_under_steady_traffic() -> None:
    engine = Engine(num_blocks=64)
    client = engine.add(new_request("b", 8, max_tokens=30, priority=BACKGROUND))
    for index in range(60):
        if index % 3 == 0:
            engine.add(new_request(f"client {index}", 8, max_tokens=2))
        engine.step()
    assert client.finish_reasons == {0: "length"}


def test_prompts_of_the_background_come_in_short_steps() -> None:
    """A step takes a millisecond for each token here, and should take 50 ms for the background while no client is
    about."""
    engine = Engine(num_blocks=512, max_num_batched_tokens=256)
    engine.seconds_per_token = 0.001
    lines = [engine.add(new_request(f"b{index}", 200, max_tokens=2, priority=BACKGROUND)) for index in range(3)]
    sizes = [engine.step().num_tokens for _ in range(8)]
    assert max(sizes) <= 65
    assert all(40 <= size <= 65 for size in sizes[1:])
    engine.add(new_request("client", 200, max_tokens=1))
    assert 200 in engine.step().num_scheduled_tokens  # clients take whole steps
    engine.run()
    assert [line.finish_reasons for line in lines] == [{0: "length"}] * 3


@pytest.mark.parametrize(("delay", "most"), [(0.1, 15), (0.3, 45)])
def test_steps_of_the_background_are_a_share_of_a_first_token_while_clients_are_about(delay: float, most: int) -> None:
    """A step takes a millisecond for each token; a client's prompt of 150 tokens, 150."""
    engine = Engine(num_blocks=512, max_num_batched_tokens=256, max_num_seqs=48, background_delay=delay)
    engine.seconds_per_token = 0.001
    lines = [engine.add(new_request(f"b{index}", 16, max_tokens=16, priority=BACKGROUND)) for index in range(48)]
    for index in range(3):
        engine.add(new_request(f"client {index}", 150, max_tokens=1))
        sizes = [engine.step().num_tokens for _ in range(8)]
    assert max(sizes[1:]) <= most * 1.3 + 1
    assert sum(sizes[3:]) >= 5 * most * 0.5
    for line in lines[2:]:
        engine.scheduler.abort(line.request.request_id)
    engine.run()
    assert all(line.finish_reasons == {0: "length"} for line in lines[:2])


def test_rows_of_the_background_are_bounded_only_while_clients_are_about() -> None:
    engine = Engine(num_blocks=512, max_num_batched_tokens=256, max_num_seqs=32)
    engine.seconds_per_token = 0.001
    for index in range(12):
        engine.add(new_request(f"b{index}", 4, max_tokens=40, priority=BACKGROUND))
    for _ in range(5):
        engine.step()
    assert len(rows_of(engine)) == 12
    engine.add(new_request("client", 60, max_tokens=1))  # 60 ms, so that a step may take 9
    for _ in range(10):
        engine.step()
    assert 4 <= len(rows_of(engine)) <= 9
    engine.now += ABOUT_SECONDS
    for _ in range(5):
        engine.step()
    assert len(rows_of(engine)) == 12


class Steps:
    """A pace on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = BackgroundPace(lambda: self.now, delay=0.1)

    def take(self, seconds: float) -> int:
        """A step of as many tokens of prompts as there may be; returns them."""
        num_tokens = self.pace.num_prompt_tokens(2048, 0)
        self.pace.begin(num_tokens, 0)
        self.now += seconds
        self.pace.end()
        return num_tokens


def test_the_pace_grows_on_a_fast_machine_and_never_ends() -> None:
    steps = Steps()
    assert [steps.take(0.01) for _ in range(30)][-1] == 2048
    steps.take(10.0)
    assert steps.take(10.0) == MIN_TOKENS


def test_the_pace_beside_clients_goes_by_the_median_of_their_times() -> None:
    steps = Steps()
    for seconds in (0.2, 0.2, 9.0):
        steps.pace.note_first_token(seconds)
    assert [steps.take(0.019) for _ in range(60)][-1] == 2048  # below a tenth of 0.2 s
    assert steps.take(0.04) == 2048
    assert steps.take(5.0) == 1023
    assert steps.take(0.001) == MIN_SHARED_TOKENS
