from hypothesis import given
from hypothesis import strategies as st

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.service import OUTPUT_TOKEN, PROMPT_TOKEN
from quire.scheduler.shortest_first import PATIENCE, ShortestFirst
from quire.scheduler.step_totals import StepTotals
from tests.scheduler.checked_engine import Engine, new_request

POOL = BlockPool(1, 1)


def new_group(number: int, num_prompt: int, max_tokens: int) -> SequenceGroup:
    return SequenceGroup(new_request(f"{number}", num_prompt, max_tokens), POOL, b"", number)


def test_the_shortest_goes_first_and_equals_keep_their_order() -> None:
    queue = ShortestFirst(StepTotals())
    for number, max_tokens in enumerate([50, 10, 30, 10]):
        queue.enter(new_group(number, 4, max_tokens))
    order = []
    while (group := queue.pop()) is not None:
        order.append(group.order[1])
    assert order == [1, 3, 2, 0]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(0, 4000), st.booleans()), max_size=60))
def test_nobody_is_overtaken_by_what_comes_after_its_patience(
    events: list[tuple[int, int, int, bool]],
) -> None:
    """The bound, as the file states it: who precedes i came before PATIENCE s(i) more was given than when i came."""
    stats = StepTotals()
    queue = ShortestFirst(stats)
    given_at: dict[int, float] = {}
    sizes: dict[int, float] = {}
    for number, (num_prompt, max_tokens, tokens_since, pops) in enumerate(events):
        stats.total_generated_tokens += tokens_since
        group = new_group(number, num_prompt, max_tokens)
        given_at[number] = OUTPUT_TOKEN * stats.total_generated_tokens
        sizes[number] = PROMPT_TOKEN * num_prompt + OUTPUT_TOKEN * max_tokens
        queue.enter(group)
        first = queue.pop() if pops else None
        if first is not None:
            left = {waiting.order[1] for waiting in queue.peek(len(events))}
            for other in left:
                assert given_at[first.order[1]] < given_at[other] + PATIENCE * sizes[other]
            if first.order[1] % 2:
                queue.push(first)  # preempted, it comes back to the place it had


def test_a_stream_of_short_requests_does_not_keep_a_long_one_out() -> None:
    """One row, always somebody short waiting: the long one starts when the bound says, not when the stream ends."""
    engine = Engine(64, 4, max_num_seqs=1, max_num_batched_tokens=32, policy="shortest")
    engine.add(new_request("first", 1, max_tokens=1))
    engine.add(new_request("long", 4, max_tokens=8))
    size = PROMPT_TOKEN * 4 + OUTPUT_TOKEN * 8
    number, longest = 0, int(PATIENCE * size)
    while "long" in engine.clients and not engine.clients["long"].token_ids[0]:
        while len(engine.clients) < 4:
            engine.add(new_request(f"short {number}", 1, max_tokens=1))
            number += 1
        engine.step()
        stats = engine.scheduler.stats()
        given_by_now = PROMPT_TOKEN * stats.total_prompt_tokens + OUTPUT_TOKEN * stats.total_generated_tokens
        # Besides the bound: the three that were waiting when it passed, and the long one's own first step.
        assert given_by_now <= longest + 4 * (PROMPT_TOKEN + OUTPUT_TOKEN) + size
    assert number > 100, "short ones do go first"
