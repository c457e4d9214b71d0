"""LookAhead, through the scheduler: steps planned before the result of the last one is known."""

import pytest

from tests.scheduler.checked_engine import Engine, embed_request, new_request
from tests.scheduler.fake_runner import (
    alone,
)


def test_decoding_is_planned_ahead_until_the_last_token() -> None:
    engine = Engine(overlaps=True)
    for index in range(3):
        engine.add(new_request(f"request {index}", [index, 1, 1], 12, can_stop=False))
    engine.run()
    assert engine.num_ahead == 11  # all but the first step, since where a sequence ends by length is known
    assert engine.num_steps == 12


def test_a_sequence_that_ends_while_the_next_step_runs_is_forgotten() -> None:
    engine = Engine(overlaps=True)
    requests = [new_request("a", [index % 3, index], 40, can_stop=True) for index in range(100)]
    request = next(r for r in requests if len(alone(r, 0).token_ids) in range(3, 20))
    client = engine.add(request)
    other = engine.add(new_request("b", [1, 1], 60, can_stop=False))
    engine.run()
    assert client.token_ids[0] == alone(request, 0).token_ids
    assert len(other.token_ids[0]) == 60
    assert engine.num_ahead > 40


@pytest.mark.parametrize("leave", ["abort", "stop"])
def test_who_leaves_while_a_step_runs_frees_everything(leave: str) -> None:
    engine = Engine(overlaps=True, max_num_seqs=2)
    engine.add(new_request("a", [0] * 6, 40, can_stop=False))
    for _ in range(4):
        engine.step()
    assert engine.in_flight is not None
    if leave == "abort":
        engine.abort("a")
    else:
        engine.stop("a", 0)
    assert engine.pool.num_free == engine.pool.num_blocks
    engine.add(new_request("b", [0] * 6, 40, can_stop=False))  # takes the row, and finds the blocks
    engine.run()


def test_beams_are_not_planned_ahead() -> None:
    engine = Engine(overlaps=True)
    engine.add(new_request("a", [0, 1], 6, n=2, beam_width=3))
    engine.run()
    assert engine.num_ahead == 0


def test_the_step_after_a_vector_is_planned_without_its_prompt() -> None:
    engine = Engine(overlaps=True, max_num_batched_tokens=8)
    vector, tokens = engine.add(embed_request("vector", 30)), engine.add(new_request("tokens", 3, 12))
    engine.run()
    assert (vector.finish_reasons, len(tokens.token_ids[0])) == ({0: "stop"}, 12)
    assert engine.num_ahead == engine.num_steps - 1


def test_no_step_is_planned_ahead_of_the_last_vector() -> None:
    engine = Engine(overlaps=True, max_num_batched_tokens=8)
    engine.add(embed_request("vector", 30))
    engine.run()
    assert (engine.num_steps, engine.num_ahead) == (4, 3)


def test_a_prompt_whose_vector_is_on_its_way_is_ending() -> None:
    engine = Engine(max_num_batched_tokens=8)
    for name, length in (("ends", 3), ("goes on", 30)):
        engine.add(embed_request(name, length))
    plan = engine.scheduler.schedule()
    ending = engine.scheduler._parts.look_ahead.assume_result(plan, None)
    assert [sequence.group.request.request_id for sequence in ending] == ["ends"]
