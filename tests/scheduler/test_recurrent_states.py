"""Which sequence owns which state, where snapshots are kept, and what they are worth on a trace of agents."""

import random

import pytest

from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.states import StatePool
from quire.outputs import EngineStats
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan, StepResult
from tests.scheduler.checked_engine import Engine, Guesses, embed_request, new_request
from tests.scheduler.fake_runner import alone


def computed(engine: Engine, request: Request) -> int:
    """Tokens that are computed for a request; it runs to its end."""
    engine.add(request)
    count = 0
    while engine.scheduler.has_work:
        count += engine.step().num_tokens
    return count


def recurrent(num_snapshots: int = 8, **options: int) -> Engine:
    return Engine(**{"num_blocks": 64, "block_size": 4, "num_snapshots": num_snapshots, **options})


# -- where snapshots are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9, 23])
def test_a_prompt_again_starts_before_its_last_block(length: int) -> None:
    engine = recurrent()
    request = new_request("a", length, max_tokens=1)
    assert computed(engine, request) == length
    again = new_request("b", request.prompt_token_ids, max_tokens=1)
    assert computed(engine, again) == length - (length - 1) // 4 * 4


@pytest.mark.parametrize("chunk", [64, 9, 8])
def test_the_end_of_a_turn_is_exact(chunk: int) -> None:
    engine = recurrent(max_num_batched_tokens=chunk)
    request = new_request("a", 13, max_tokens=6)
    computed(engine, request)
    turn = [*request.prompt_token_ids, *alone(request, 0).token_ids, 7, 8]
    assert computed(engine, new_request("b", turn, max_tokens=1)) == 3  # the last token was never computed


def test_a_vector_and_a_sample_share_a_prompt() -> None:
    engine = recurrent()
    request = embed_request("a", 14)
    assert computed(engine, request) == 14
    assert computed(engine, new_request("b", [*request.prompt_token_ids, 5], max_tokens=1)) == 1


def test_what_others_begin_like_is_kept_once_it_shows() -> None:
    engine = recurrent()
    shared = new_request("shared", 17).prompt_token_ids
    prompts = [[*shared, 50 + number, *range(9)] for number in range(4)]
    counts = [computed(engine, new_request(f"{n}", prompt, max_tokens=1)) for n, prompt in enumerate(prompts)]
    assert counts == [27, 27, 11, 11]
    assert engine.scheduler.stats().prefix_misses["state"] == 1


@pytest.mark.parametrize("chunk", [200, 9])
def test_requests_that_come_together_wait_where_they_part(chunk: int) -> None:
    engine = recurrent(num_blocks=200, max_num_batched_tokens=chunk)
    shared = new_request("shared", 33).prompt_token_ids
    clients = [engine.add(new_request(f"{n}", [*shared, 50 + n, 7, 8], max_tokens=2)) for n in range(6)]
    count = 0
    while engine.scheduler.has_work:
        count += engine.step().num_tokens
    # One computes its 36 prompt tokens, the others 4 each; and all their first output token.
    assert count == 36 + 5 * 4 + 6
    assert len(clients) == 6
    assert engine.scheduler.stats().total_prefix_hits == 5 * 32


def test_a_prompt_is_not_awaited_in_vain() -> None:
    """The one that computes the prefix is aborted: the next one goes on from where it was."""
    engine = recurrent(max_num_batched_tokens=9)
    shared = new_request("shared", 33).prompt_token_ids
    engine.add(new_request("a", [*shared, 1], max_tokens=2))
    engine.add(new_request("b", [*shared, 2], max_tokens=2))
    engine.step()
    engine.abort("a")
    engine.run()
    assert engine.scheduler.stats().total_prefix_hits == 9


def test_without_room_for_snapshots_requests_still_run() -> None:
    engine = recurrent(0, max_num_seqs=2)
    prompt = new_request("a", 20).prompt_token_ids
    for number in range(3):
        engine.add(new_request(f"{number}", prompt, max_tokens=3))
    engine.run()
    assert engine.scheduler.stats().states.total_skipped > 0


# -- what ends or goes wrong ------------------------------------------------------------------------------------------


def test_a_preempted_sequence_goes_on_from_its_state() -> None:
    counts = []
    for caching in (True, False):
        engine = Engine(12, 4, num_snapshots=8, max_num_batched_tokens=16, enable_prefix_caching=caching)
        for number in range(3):
            engine.add(new_request(f"{number}", 12, max_tokens=16))
        counts.append(0)
        while engine.scheduler.has_work:
            counts[-1] += engine.step().num_tokens
        stats = engine.scheduler.stats()
        assert stats.total_preemptions > 0
        assert (stats.states.total_hits > 0) == caching
    assert counts[0] < counts[1]


def test_a_failed_sequence_leaves_no_snapshot() -> None:
    """Seed -1 fails at some context; what it computed, and what began like it, must not be found again."""
    engine = recurrent()
    failing = next(
        request
        for number in range(50)
        if alone(request := new_request(f"{number}", 9, max_tokens=9, seed=-1), 0).finish_reason == "error"
        and len(alone(request, 0).token_ids) > 2
    )
    engine.add(failing)
    engine.run()
    assert engine.scheduler.stats().states.num_snapshots == 0
    assert computed(engine, new_request("b", failing.prompt_token_ids, max_tokens=1)) == 9


@pytest.mark.parametrize("when", ["before", "within"])
def test_an_aborted_sequence_leaves_what_is_known(when: str) -> None:
    engine = recurrent()
    request = new_request("a", 10, max_tokens=20)
    engine.add(request)
    for _ in range(3):
        engine.step()
    if when == "before":
        engine.abort("a")
    else:
        plan = engine.scheduler.schedule()
        engine.scheduler.abort("a")
        engine.clients.clear()
        engine.update(plan, engine.runner.execute(plan))
    engine.check()
    turn = [*request.prompt_token_ids, *alone(request, 0).token_ids[:3], 5, 6, 7]
    # Aborted while a step runs, its state may or may not be one token further: only that of its prompt is known.
    assert computed(engine, new_request("b", turn, max_tokens=1)) == 16 - (12 if when == "before" else 8)


def test_a_reset_removes_all_snapshots() -> None:
    engine = recurrent()
    request = new_request("a", 20, max_tokens=1)
    computed(engine, request)
    engine.scheduler.reset_prefix_cache()
    assert engine.scheduler.stats().states.num_snapshots == 0
    assert computed(engine, new_request("b", request.prompt_token_ids, max_tokens=1)) == 20


@pytest.mark.parametrize("longest_draft", [0, 5])
@pytest.mark.parametrize("seed", range(12))
def test_crowds_get_what_they_would_get_alone(seed: int, longest_draft: int) -> None:
    rng = random.Random(seed)
    requests = []
    for number in range(14):
        n = rng.choice([1, 1, 2, 4])
        request = new_request(
            f"{number}",
            [0] * rng.randrange(12) + [rng.randrange(2) for _ in range(rng.randrange(1, 16))],
            max_tokens=rng.randrange(1, 24),
            n=n,
            seed=rng.randrange(-1, 5),
            priority=rng.randrange(2),
            prompt_logprobs=rng.choice([None, None, 0]),
            can_stop=rng.random() < 0.3,
            beam_width=min(4, n + rng.randrange(3)) if rng.random() < 0.3 else None,
            structured=rng.random() < 0.3,
        )
        if rng.random() < 0.3 and request.params.beam_width is None:
            for index in range(n):
                token_ids = alone(request, index).token_ids
                request.output_token_ids[index] = token_ids[: rng.randrange(len(token_ids) + 1)][:-1]
        requests.append(request)
    engine = Engine(
        60,
        rng.choice([2, 4, 7]),
        max_num_seqs=rng.randrange(4, 12),
        max_num_batched_tokens=rng.choice([12, 20, 100]),
        enable_prefix_caching=rng.random() < 0.8,
        num_failures=seed % 3,
        num_snapshots=rng.choice([0, 1, 3, 30]),
        guesses=Guesses(seed, longest_draft) if longest_draft else None,
    )
    while requests or engine.scheduler.has_work:
        while requests and rng.random() < 0.4:
            engine.add(requests.pop())
        if engine.clients and rng.random() < 0.03:
            engine.abort(rng.choice(sorted(engine.clients)))
        engine.step()
        assert engine.num_steps < 2_000


# -- a trace ----------------------------------------------------------------------------------------------------------


def run_agents(num_agents: int, num_turns: int, *, recurrent: bool, keeps_thoughts: bool) -> EngineStats:
    """Agents with one system prompt, whose prompts grow turn by turn, on a scheduler whose executor draws tokens.

    Without `keeps_thoughts` a turn leaves only the second half of its answer in the next prompt, as templates of
    reasoning models do.
    """
    states = StatePool(3 * num_agents, num_agents) if recurrent else None
    scheduler = Scheduler(
        BlockPool(12_000, 16),
        SchedulerLimits(max_num_seqs=num_agents, max_num_batched_tokens=2048, max_model_len=20_000),
        states=states,
    )
    rng = random.Random(0)

    def text(length: int) -> list[int]:
        return [rng.randrange(1_000) for _ in range(length)]

    system = text(1_500)
    prompts = {agent: [*system, *text(rng.randrange(50, 300))] for agent in range(num_agents)}
    outputs: dict[str, list[int]] = {}
    for turn in range(num_turns):
        for agent, prompt in prompts.items():
            length = rng.randrange(20, 80)
            params = SamplingParams(max_tokens=length)
            name = f"{agent} {turn}"
            scheduler.add(Request(request_id=name, prompt_token_ids=prompt, params=params, max_tokens=length))
            outputs[f"{agent} {turn}"] = []
        while scheduler.has_work:
            plan = scheduler.schedule()
            for delta in scheduler.update(plan, draw(plan, rng)):
                outputs[delta.request_id] += delta.token_ids
        for agent, prompt in prompts.items():
            answer = outputs[f"{agent} {turn}"]
            kept = answer if keeps_thoughts else [1, *answer[len(answer) // 2 :]]
            prompts[agent] = [*prompt, *kept, *text(rng.randrange(30, 200))]
    return scheduler.stats()


def draw(plan: StepPlan, rng: random.Random) -> StepResult:
    """The result of a step whose tokens are drawn by chance."""
    count = len(plan.sample_rows)
    return StepResult([rng.randrange(1_000) for _ in range(count)], [None] * count, [None] * count)


@pytest.mark.parametrize("keeps_thoughts", [True, False])
@pytest.mark.parametrize("num_agents", [1, 4])
def test_agents_are_found_as_in_a_dense_model(num_agents: int, keeps_thoughts: bool) -> None:
    dense, hybrid = (
        run_agents(num_agents, 33, recurrent=recurrent, keeps_thoughts=keeps_thoughts) for recurrent in (False, True)
    )
    rates = [100 * stats.total_prefix_hits / stats.total_prefix_queries for stats in (dense, hybrid)]
    print(f"{num_agents} agents, thoughts {keeps_thoughts}: dense {rates[0]:.2f} %, recurrent {rates[1]:.2f} %")
    assert rates[1] > 80
    assert abs(rates[0] - rates[1]) <= 2
