"""Prompts of tenants that ask much: they stand back behind those of tenants that ask little."""

import random
import statistics
from dataclasses import replace

import pytest

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.fair_share import FairShare
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.tenant_pace import ABOUT_SECONDS, MIN_TOKENS
from quire.step import StepPlan
from tests.scheduler.checked_engine import Engine, counts_by_request, new_request

SECONDS_PER_TOKEN = 0.001
LIGHT_PROMPT = 100


class Traffic:
    """A light tenant that asks now and then, and perhaps a heavy one with ten times its requests."""

    def __init__(self, heavy_prompt: int, policy: str = "fair") -> None:
        self.engine = Engine(500, max_num_seqs=8, max_num_batched_tokens=256, policy=policy)
        self.engine.seconds_per_token = SECONDS_PER_TOKEN
        self.heavy_prompt = heavy_prompt
        self.rng = random.Random(1)
        self.num_sent = 0

    def send(self, tenant: str, prompt: int) -> str:
        self.num_sent += 1
        name = f"{tenant} {self.num_sent}"
        length = 8 if tenant == "heavy" else 2  # a light answer ends before the next request, and its row is free
        self.engine.add(replace(new_request(name, prompt, max_tokens=length), tenant=tenant))
        return name

    def step(self) -> StepPlan:
        return self.engine.step()

    def fill(self, num_heavy: int) -> None:
        """Have so many requests of the heavy tenant in flight."""
        groups = self.engine.scheduler.groups
        while sum(name.startswith("heavy") for name in groups) < num_heavy:
            self.send("heavy", self.heavy_prompt)

    def first_token_seconds(self, num_heavy: int, pause: tuple[int, int] = (8, 30)) -> float:
        """A light request comes at a random moment of a step, so many steps after the last one: seconds until its first
        token."""
        engine = self.engine
        for _ in range(self.rng.randrange(*pause)):
            self.fill(num_heavy)
            if engine.scheduler.has_work:
                self.step()
        self.fill(num_heavy)
        begin = engine.now
        if engine.scheduler.has_work:
            self.step()  # it comes within this step
        arrived = begin + self.rng.random() * (engine.now - begin)
        name = self.send("light", LIGHT_PROMPT)
        while name in engine.scheduler.groups and engine.scheduler.groups[name].awaits_first_token:
            self.fill(num_heavy)
            self.step()
        return engine.now - arrived


@pytest.mark.parametrize(("heavy_prompt", "pause"), [(12, (8, 30)), (230, (8, 30)), (230, (0, 4)), (12, (0, 1))])
def test_a_light_tenant_waits_little_longer_beside_a_heavy_one(heavy_prompt: int, pause: tuple[int, int]) -> None:
    """A step takes a millisecond for each token. With short pauses the light tenant was just given more service."""
    alone = LIGHT_PROMPT * SECONDS_PER_TOKEN
    traffic = Traffic(heavy_prompt)
    traffic.fill(10)
    for _ in range(6):
        traffic.first_token_seconds(10, pause)  # until steps are learned
    beside = sorted(traffic.first_token_seconds(10, pause) for _ in range(20))
    assert statistics.median(beside) <= 1.2 * alone
    assert beside[-1] <= 1.3 * alone


def test_a_heavy_tenant_goes_on_beside_light_prompts_without_end() -> None:
    traffic = Traffic(200)
    first = traffic.send("heavy", 200)
    for _ in range(9):
        traffic.fill(10)
    for _ in range(60):
        traffic.first_token_seconds(0)
        if first not in traffic.engine.scheduler.groups:
            return
    raise AssertionError("the heavy tenant starves")


def heavy_tokens(traffic: Traffic) -> int:
    """Tokens of prompts of the heavy tenant in the next step."""
    counts = counts_by_request(traffic.engine, traffic.step())
    return sum(count for name, count in counts.items() if name.startswith("heavy") and count > 1)


def test_chunks_are_whole_again_when_light_tenants_have_gone() -> None:
    traffic = Traffic(230)
    traffic.fill(10)
    assert heavy_tokens(traffic) > 200
    for _ in range(6):
        traffic.first_token_seconds(10)
    traffic.fill(10)
    for _ in range(4):
        traffic.step()
    assert heavy_tokens(traffic) <= 3 * MIN_TOKENS
    traffic.engine.now += ABOUT_SECONDS
    for _ in range(3):
        traffic.fill(10)
        traffic.step()
    assert heavy_tokens(traffic) > 100


@pytest.mark.parametrize(("policy", "num_requests"), [("fcfs", 10), ("fair", 3)])
def test_equal_tenants_and_other_policies_take_whole_steps(policy: str, num_requests: int) -> None:
    traffic = Traffic(230, policy)
    traffic.send("light", 20)
    for _ in range(num_requests):
        traffic.send("heavy", 230)
    assert heavy_tokens(traffic) > 150


@pytest.mark.parametrize(
    ("requests", "heavy"),
    [
        ({"a": 8, "b": 1}, {"a"}),
        ({"a": 4, "b": 1}, {"a"}),
        ({"a": 3, "b": 1}, set()),
        ({"a": 8, "b": 3}, set()),
        ({"a": 8, "b": 8}, set()),
        ({"a": 20, "b": 20, "c": 1, "d": 1}, set()),
        ({"a": 60, "b": 10, "c": 1, "d": 1}, {"a"}),
        ({"a": 50}, set()),
    ],
)
def test_a_tenant_is_heavy_by_its_requests_beside_those_of_others(requests: dict[str, int], heavy: set[str]) -> None:
    queue, pool = FairShare(), BlockPool(1, 1)
    names = [tenant for tenant, count in requests.items() for _ in range(count)]
    for number, tenant in enumerate(names):
        queue.enter(SequenceGroup(replace(new_request(f"{number}", 4), tenant=tenant), pool, b"", number))
    assert queue.heavy_tenants([]) == set(), "it was given no more than the others"
    for tenant, count in requests.items():
        queue.serve(tenant, 10.0 * count)
    assert queue.heavy_tenants([]) == heavy
    if heavy:
        queue.serve("b", 10.0 * requests["a"])  # one of the others comes back, and is given a little more
        assert queue.heavy_tenants([]) == heavy
    running = [queue.pop() for _ in range(len(names) // 2)]
    assert queue.heavy_tenants([group for group in running if group is not None]) == heavy, "it counts what runs, too"
