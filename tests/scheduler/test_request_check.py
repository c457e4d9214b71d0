"""RequestCheck, through the scheduler: what can never run is refused, and what passes runs."""

import pytest

from quire.errors import RequestError
from quire.request import Request
from tests.scheduler.checked_engine import Engine, embed_request, new_request


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (new_request("a", []), "prompt", "the prompt is empty: it must hold at least one token"),
        (
            new_request("a", 250, 7),
            "max_tokens",
            "the prompt has 250 tokens and max_tokens is 7; together they exceed this model's context: its maximum "
            "context length is 256 tokens",
        ),
        (new_request("a", 1, n=9), "n", "n is 9, but at most 8 sequences run at once (max_num_seqs)"),
        (
            new_request("a", 40, 26),
            "max_tokens",
            "1 sequences of 40 prompt + 26 output tokens can need 17 KV blocks of 4 tokens, but the pool has 16; "
            "ask for less or raise kv_cache_memory",
        ),
        (
            new_request("a", 41, 7, n=4),
            "max_tokens",
            "4 sequences of 41 prompt + 7 output tokens can need 18 KV blocks of 4 tokens, but the pool has 16; "
            "ask for less or raise kv_cache_memory",
        ),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(request_: Request, param: str, message: str) -> None:
    engine = Engine(num_blocks=16)
    with pytest.raises(RequestError) as caught:
        engine.add(request_)
    assert (caught.value.param, caught.value.message) == (param, message)
    assert not engine.scheduler.has_work


def test_an_id_in_use_is_refused() -> None:
    engine = Engine()
    engine.add(new_request("a", 4))
    with pytest.raises(RequestError, match="request id a is in use"):
        engine.scheduler.add(new_request("a", 4))
    engine.run()
    engine.add(new_request("a", 4))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("prompt", [1, 4, 7])
def test_what_passes_the_door_runs_in_a_pool_of_exactly_its_size(n: int, block_size: int, prompt: int) -> None:
    request = new_request("a", prompt, max_tokens=9, n=n)
    shared = prompt // block_size
    exactly = shared + n * (-(-(prompt + 8) // block_size) - shared)
    with pytest.raises(RequestError, match=f"can need {exactly} KV blocks"):
        Engine(exactly - 1, block_size).add(request)
    engine = Engine(exactly, block_size)
    engine.add(request)
    engine.run(max_steps=20)
    assert engine.scheduler.stats().total_preemptions == 0


def test_a_request_as_large_as_the_pool_needs_no_watermark() -> None:
    engine = Engine(200, 1, max_num_batched_tokens=256)
    client = engine.add(new_request("a", 200, max_tokens=1))
    engine.run(max_steps=1)
    assert client.finish_reasons == {0: "length"}


def test_a_vector_needs_room_for_its_prompt_alone() -> None:
    engine = Engine(num_blocks=64)
    engine.add(embed_request("fits", 256))
    engine.run()
    for too_long in (257, 300):
        with pytest.raises(RequestError, match=f"the prompt has {too_long} tokens and max_tokens is 0"):
            engine.add(embed_request("too long", too_long))
    with pytest.raises(RequestError, match="40 prompt \\+ 0 output tokens can need 10 KV blocks of 4 tokens"):
        Engine(num_blocks=9).add(embed_request("too large", 40))
