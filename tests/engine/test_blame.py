"""Blame against a model of an engine: guilty requests are found, and innocent ones never."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.blame import Blame, Quarantine
from quire.request import Request
from quire.sampling_params import SamplingParams


def live(blame: Blame, requests: list[str], guilty: set[str]) -> tuple[list[str], int]:
    """Run an engine that dies in every step with a guilty request; returns who was found, and the number of deaths."""
    found: list[str] = []
    deaths = 0
    while guilty - set(found) or blame.group:
        running = [name for name in requests if name not in found and blame.may_run(name)]
        if guilty & set(running):
            deaths += 1
            culprit = blame.count_death(running)
            if culprit is not None:
                found.append(culprit)
            continue
        for name in running:
            blame.clear(name)
    return found, deaths


@given(st.integers(1, 60), st.sets(st.integers(0, 59), min_size=1, max_size=4))
def test_guilty_requests_are_found_by_halving(num_requests: int, chosen: set[int]) -> None:
    requests = [f"r{number}" for number in range(num_requests)]
    guilty = {f"r{number % num_requests}" for number in chosen}
    blame = Blame()
    found, deaths = live(blame, requests, guilty)
    assert set(found) == guilty
    assert len(found) == len(guilty)
    assert blame.group == ()
    assert not any(blame.may_run(name) is False for name in requests), "nobody waits for ever"
    assert deaths <= 3 + len(guilty) * (2 + num_requests.bit_length())


@given(st.integers(0, 2**32))
def test_nobody_is_found_where_the_engine_is_killed_from_outside(seed: int) -> None:
    """A kill hits any subset; between kills every request that runs gets a token more often than not."""
    draw = random.Random(seed)
    blame = Blame()
    requests = [f"r{number}" for number in range(8)]
    for _ in range(40):
        running = [name for name in requests if blame.may_run(name)]
        assert running
        for name in running:
            blame.clear(name)
        assert blame.count_death(draw.sample(running, draw.randint(0, len(running)))) is None
    for _ in range(9):
        for name in [name for name in requests if blame.may_run(name)]:
            blame.clear(name)
    assert all(blame.may_run(name) for name in requests)


def test_a_request_alone_is_found_at_its_third_death() -> None:
    blame = Blame()
    assert [blame.count_death(["r0"]) for _ in range(3)] == [None, None, "r0"]
    assert blame.group == ()


@pytest.mark.parametrize("end", ["clear", "move_on"])
def test_the_others_run_when_a_suspect_gets_a_token_ends_or_takes_long(end: str) -> None:
    blame = Blame()
    for _ in range(2):
        blame.count_death(["r0", "r1"])
    assert blame.group == ("r0",)
    assert not blame.may_run("r2")
    blame.clear("r0") if end == "clear" else blame.move_on()
    assert blame.group == ("r1",)
    blame.clear("r1")
    assert blame.may_run("r2")


def test_a_suspect_that_died_after_it_ran_apart_is_found_beside_others() -> None:
    """A long prompt gets no token while it runs apart, and dies only later."""
    blame = Blame()
    for _ in range(2):
        blame.count_death(["long", "other"])
        blame.clear("other")
    blame.move_on()
    assert blame.may_run("other")
    assert blame.count_death(["long", "other"]) == "long"


def test_quarantine_knows_contents_not_seeds_and_forgets() -> None:
    now = 0.0
    quarantine = Quarantine(10.0, lambda: now)

    def request(name: str, prompt: list[int], **params: object) -> Request:
        return Request(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params))  # type: ignore[arg-type]

    quarantine.add(request("r0", [1, 2], seed=5))
    assert quarantine.remaining(request("r1", [1, 2], seed=6)) == 10.0
    assert quarantine.remaining(request("r2", [1, 2], top_k=3)) == 0.0
    assert quarantine.remaining(request("r3", [1, 3])) == 0.0
    now = 10.0
    assert quarantine.remaining(request("r4", [1, 2])) == 0.0
