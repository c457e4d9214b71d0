"""Anything in any order: crowds in small pools, and the state machine."""

import random

import pytest
from hypothesis import settings

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.sequence import SequenceGroup
from tests.scheduler.checked_engine import Engine, Guesses, embed_request, new_request
from tests.scheduler.fake_runner import (
    alone,
)
from tests.scheduler.scheduler_machine import WINDOWS, SchedulerMachine

MIXES = [(windows, 100 + place) for place, windows in enumerate(2 * WINDOWS) if windows != (0,)]


@pytest.mark.parametrize("overlaps", [False, True], ids=["one by one", "overlapped"])
@pytest.mark.parametrize(("windows", "seed"), [((0,), seed) for seed in range(24)] + MIXES)
def test_crowds_in_a_pool_that_hardly_holds_the_largest_of_them(
    seed: int, windows: tuple[int, ...], overlaps: bool
) -> None:
    """Little memory and much to do: groups preempt each other all the time, and everybody still gets through."""
    rng = random.Random(seed)
    beams = 0.1 if overlaps else 0.4
    block_size = rng.choice([1, 2, 4, 7])
    requests = []
    for number in range(14):
        n = rng.choice([1, 1, 2, 4])
        prompt = [0] * rng.randrange(12) + [rng.randrange(2) for _ in range(rng.randrange(1, 16))]
        request = new_request(
            f"{number}",
            prompt,
            max_tokens=rng.randrange(1, 28),
            n=n,
            seed=rng.randrange(-1, 5),
            priority=rng.randrange(2),
            logprobs=rng.choice([None, None, 1]),
            prompt_logprobs=rng.choice([None, None, 0]),
            can_stop=rng.random() < 0.3,
            beam_width=min(4, n + rng.randrange(3)) if rng.random() < beams else None,
            early_stopping=rng.choice([False, True, "never"]),
            structured=rng.random() < 0.3,
        )
        if rng.random() < 0.3 and request.params.beam_width is None:
            for index in range(n):
                token_ids = alone(request, index).token_ids
                request.output_token_ids[index] = token_ids[: rng.randrange(len(token_ids) + 1)][:-1]
        requests.append(request)
    others = random.Random(seed)
    for number in range(5):
        prompt = [0] * others.randrange(12) + [others.randrange(2) for _ in range(others.randrange(1, 40))]
        vector = embed_request(f"vector {number}", prompt, seed=others.randrange(-1, 5), priority=others.randrange(2))
        requests.insert(others.randrange(len(requests)), vector)
    pool = BlockPool(1, block_size, windows=windows)
    largest = max(SequenceGroup(request, pool, b"", 0).max_blocks(pool) for request in requests)
    engine = Engine(
        largest + rng.choice([0, 0, 1, 8]),
        block_size,
        max_num_seqs=rng.randrange(4, 12),
        max_num_batched_tokens=rng.choice([12, 20, 100]),
        max_num_partial_prefills=rng.randrange(1, 5),
        enable_prefix_caching=rng.random() < 0.7,
        guesses=Guesses(seed, rng.randrange(1, 9)) if seed % 2 and not overlaps else None,
        overlaps=overlaps,
        num_failures=seed % 3 if overlaps else 0,
        windows=windows,
    )
    while requests or engine.scheduler.has_work:
        while requests and rng.random() < 0.4:
            engine.add(requests.pop())
        engine.step()
        assert engine.num_steps < 2_000
    assert engine.pool.num_free == engine.pool.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30)
