"""What requests share through the prefix cache: exactly what is the same, images and adapters included.

The content of a token slot is a chain over everything that its KV depends on. A sequence that gets a block of another
context reads another chain.
"""

import itertools
import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import RequestError
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import HOST, Tier, TierIndex
from quire.request import InputSpan, Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import SequenceGroup
from quire.step import StepResult

SIZE = 4
NUMBERS = itertools.count()
IMAGE = 99
"""The placeholder token of every image."""


def chain(request: Request, token_ids: SequenceOf[int]) -> list[object]:
    """What the KV of each token depends on, by definition."""
    covered = {s.offset + index: (s.content_hash, index) for s in request.inputs for index in range(s.length)}
    value: int = hash((request.cache_salt, request.adapter))
    values: list[object] = []
    for index, token in enumerate(token_ids):
        value = hash((value, token, covered.get(index)))
        values.append(value)
    return values


class Cache:
    """A scheduler, and a memory that is written and read as its plans say."""

    def __init__(self, num_blocks: int = 64, num_host_blocks: int = 0) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.tiers = TierIndex(lambda: 1.0, host=Tier(num_host_blocks, 1)) if num_host_blocks else None
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=256),
            tiers=self.tiers,
            clock=lambda: 1.0,
        )
        self.memory: list[list[object]] = [[None] * SIZE for _ in range(num_blocks)]
        self.host: dict[bytes, list[object]] = {}

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan.offload is not None:
            for _, name in plan.offload.evicted:
                del self.host[name]
            for _, name, block in plan.offload.stores:
                self.host[name] = self.memory[block].copy()
            for _, name, block in plan.offload.loads:
                self.memory[block] = self.host[name].copy()
        for source, destination in plan.block_copies:
            self.memory[destination] = self.memory[source].copy()
        for row, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            sequence = self.scheduler._queues.rows[row]
            assert sequence is not None
            expected = chain(sequence.group.request, sequence.token_ids[: start + count])
            slots = [(sequence.table.blocks[index // SIZE], index % SIZE) for index in range(start + count)]
            for (block, slot), value in list(zip(slots, expected, strict=True))[start:]:
                self.memory[block][slot] = value
            assert [self.memory[block][slot] for block, slot in slots] == expected, "KV of another context"
        num_samples = len(plan.sample_rows)
        result = StepResult([0] * num_samples, [None] * num_samples, [None] * num_samples)
        self.scheduler.update(plan, result)

    def run(self, request: Request) -> SequenceGroup:
        """Serve a request alone; its group, when it has ended."""
        self.scheduler.add(request)
        group = self.scheduler._queues.by_id[request.request_id]
        while self.scheduler.has_work:
            self.step()
        return group

    def num_cached(self, request: Request) -> int:
        """Serve a request alone; how many tokens of its prompt it found."""
        return self.run(request).num_cached_tokens


def new_request(
    token_ids: list[int],
    *images: tuple[bytes, int, int],
    adapter: str = "",
    salt: str = "",
    max_tokens: int = 1,
    n: int = 1,
) -> Request:
    return Request(
        request_id=str(next(NUMBERS)),
        prompt_token_ids=token_ids,
        params=SamplingParams(n=n),
        max_tokens=max_tokens,
        cache_salt=salt,
        adapter=adapter,
        inputs=tuple(InputSpan(*image) for image in images),
    )


TEXT_AND_IMAGE = [1, 2, 3, 4, 5, *[IMAGE] * 8, 6, 7, 8]


def test_prompts_with_different_images_share_what_is_before_the_image() -> None:
    cache = Cache()
    assert cache.num_cached(new_request(TEXT_AND_IMAGE, (b"cat", 5, 8))) == 0
    assert cache.num_cached(new_request(TEXT_AND_IMAGE, (b"dog", 5, 8))) == 5, "a block, and one token of the next"
    assert cache.num_cached(new_request(TEXT_AND_IMAGE)) == 5, "tokens that look like an image are none"
    assert cache.num_cached(new_request(TEXT_AND_IMAGE, (b"cat", 5, 7))) == 12, "the image ends before its last token"


def test_the_same_image_is_found() -> None:
    cache = Cache()
    for expected in (0, 15, 15):
        assert cache.num_cached(new_request(TEXT_AND_IMAGE, (b"cat", 5, 8))) == expected
    assert cache.num_cached(new_request([*TEXT_AND_IMAGE[:13], 9, 9], (b"cat", 5, 8))) == 13


def test_the_same_image_in_another_place_is_another_prefix() -> None:
    cache, placeholders = Cache(), [IMAGE] * 16
    assert cache.num_cached(new_request(placeholders, (b"cat", 4, 8))) == 0
    assert cache.num_cached(new_request(placeholders, (b"cat", 5, 8))) == 4
    assert cache.num_cached(new_request(placeholders, (b"cat", 0, 8))) == 0
    assert cache.num_cached(new_request(placeholders, (b"cat", 4, 4), (b"cat", 8, 4))) == 8, "two small ones"


def test_samples_of_one_prompt_keep_its_image() -> None:
    """The image ends in the block where they part, which each of them fills by itself."""
    cache, prompt = Cache(), [1, 2, *[IMAGE] * 4]
    cache.run(new_request(prompt, (b"cat", 2, 4), n=3, max_tokens=4))
    assert cache.num_cached(new_request([*prompt, 0, 0, 9], (b"cat", 2, 4))) == 8
    assert cache.num_cached(new_request([*prompt, 0, 0, 9], (b"dog", 2, 4))) == 2


def test_adapters_never_share() -> None:
    cache, prompt = Cache(), list(range(12))
    assert [cache.num_cached(new_request(prompt, adapter=name)) for name in ("", "a", "b")] == [0, 0, 0]
    assert [cache.num_cached(new_request(prompt, adapter=name)) for name in ("", "a", "b")] == [11, 11, 11]
    assert cache.num_cached(new_request(prompt, salt="a")) == 0, "an adapter is no salt"


def test_what_was_missed_is_explained() -> None:
    cache, image = Cache(), [IMAGE] * 8

    def reason(request: Request) -> str:
        miss = cache.run(request).miss
        assert miss is not None
        return miss.reason

    assert reason(new_request([*image, 1], (b"cat", 0, 8))) == "new"
    assert reason(new_request([*image, 1], (b"dog", 0, 8))) == "new", "no tenant has it"
    assert reason(new_request([*image, 1], (b"cat", 0, 8), adapter="a")) == "new"
    assert reason(new_request([*image, 1], (b"cat", 0, 8), salt="s")) == "salt"
    assert reason(new_request([*image, 1], (b"cat", 0, 4), (b"dog", 4, 4))) == "differs"


def test_a_request_waits_only_for_the_prefix_that_it_can_share() -> None:
    """Two with the same image compute it once; one with another image does not wait for them."""
    cache = Cache()
    for name in (b"cat", b"cat", b"dog"):
        cache.scheduler.add(new_request([*[IMAGE] * 12, 1, 2], (name, 0, 12)))
    cache.step()
    assert (cache.scheduler.stats().num_running, cache.scheduler.stats().num_waiting) == (2, 1)
    while cache.scheduler.has_work:
        cache.step()
    stats = cache.scheduler.stats()
    assert (stats.total_prompt_tokens, stats.total_prefix_hits) == (14 + 1 + 14, 13)


def test_a_registered_prefix_keeps_its_image_and_its_adapter() -> None:
    cache, prompt = Cache(), [1, 2, *[IMAGE] * 6, 3, 4, 5]
    prefix = new_request(prompt, (b"cat", 2, 6), adapter="a", salt="one")
    cache.scheduler.register_prefix(prefix, ("one", "two"))
    while cache.scheduler.has_work:
        cache.step()
    assert cache.scheduler.stats().num_pinned_blocks == 2
    cache.scheduler.reset_prefix_cache()
    # Found under another salt: there the chain differs in the salt alone, which no KV depends on.
    cache.memory = [[None] * SIZE for _ in cache.memory]
    same = new_request(prompt, (b"cat", 2, 6), adapter="a", salt="two")
    cache.scheduler.add(same)
    assert cache.scheduler.schedule().num_computed_tokens == [8]
    cache.scheduler.abort(same.request_id)
    for other in (
        new_request(prompt, (b"dog", 2, 6), adapter="a", salt="two"),
        new_request(prompt, (b"cat", 2, 6), adapter="b", salt="two"),
    ):
        cache.scheduler.add(other)
        assert cache.scheduler.schedule().num_computed_tokens == [0]
        cache.scheduler.abort(other.request_id)


@pytest.mark.parametrize(("offset", "length", "num_blocks"), [(0, 8, 2), (3, 6, 0), (4, 5, 1), (4, 4, 2), (8, 2, 2)])
def test_a_registered_prefix_holds_an_image_whole_or_not_at_all(offset: int, length: int, num_blocks: int) -> None:
    cache = Cache()
    prefix = new_request([IMAGE] * 10, (b"cat", offset, length))
    if not num_blocks:
        with pytest.raises(RequestError, match="only full blocks are kept"):
            cache.scheduler.register_prefix(prefix, ("",))
        return
    cache.scheduler.register_prefix(prefix, ("",))
    while cache.scheduler.has_work:
        cache.step()
    assert cache.scheduler.stats().num_pinned_blocks == num_blocks


def test_a_block_comes_back_from_a_tier_for_its_own_image_alone() -> None:
    cache, prompt = Cache(num_blocks=6, num_host_blocks=64), [*[IMAGE] * 8, 1, 2]
    assert cache.num_cached(new_request(prompt, (b"cat", 0, 8), adapter="a")) == 0
    cache.run(new_request(list(range(1000, 1020))))  # takes all blocks
    assert cache.num_cached(new_request(prompt, (b"dog", 0, 8), adapter="a")) == 0
    cache.run(new_request(list(range(2000, 2020))))
    assert cache.num_cached(new_request(prompt, (b"cat", 0, 8))) == 0
    cache.run(new_request(list(range(3000, 3020))))
    assert cache.num_cached(new_request(prompt, (b"cat", 0, 8), adapter="a")) == 8
    assert cache.tiers is not None
    assert cache.tiers.tiers[HOST].stats.total_loaded == 2


# -- any requests ----------------------------------------------------------------------------------------------------


@st.composite
def requests(draw: st.DrawFn) -> Request:
    token_ids = draw(st.lists(st.sampled_from([0, IMAGE]), min_size=1, max_size=14))
    images, end = list[tuple[bytes, int, int]](), 0
    while end < len(token_ids) and draw(st.booleans()):
        offset = draw(st.integers(end, len(token_ids) - 1))
        images.append((draw(st.sampled_from([b"cat", b"dog"])), offset, draw(st.integers(1, len(token_ids) - offset))))
        end = images[-1][1] + images[-1][2]
    adapter, salt = draw(st.sampled_from(["", "a"])), draw(st.sampled_from(["", "", "s"]))
    return new_request(
        token_ids, *images, adapter=adapter, salt=salt, max_tokens=draw(st.integers(1, 6)), n=draw(st.integers(1, 3))
    )


@given(st.lists(requests(), max_size=7))
def test_every_request_finds_the_full_blocks_that_are_the_same_and_no_other_token(all_requests: list[Request]) -> None:
    """A partly filled block may be lost: the sequence that continues it overwrites the tokens after the common ones."""
    cache, seen = Cache(), list[list[object]]()
    for request in all_requests:
        request = replace(request, max_tokens=1, params=SamplingParams())
        mine = chain(request, request.prompt_token_ids)
        common = max((sum(a == b for a, b in zip(mine, other, strict=False)) for other in seen), default=0)
        same, size = min(common, len(mine) - 1), cache.pool.block_size
        assert same // size * size <= cache.num_cached(request) <= same
        seen.append(mine)


@given(st.lists(requests(), max_size=12), st.integers(9, 24), st.sampled_from([0, 8]), st.randoms())
def test_no_request_reads_the_kv_of_another_context(
    all_requests: list[Request], num_blocks: int, num_host_blocks: int, rng: random.Random
) -> None:
    """Several at once, in a pool in which blocks are evicted and groups are preempted."""
    cache = Cache(num_blocks, num_host_blocks)
    for request in all_requests:
        cache.scheduler.add(request)
        for _ in range(rng.randrange(4)):
            if cache.scheduler.has_work:
                cache.step()
    while cache.scheduler.has_work:
        cache.step()
    assert cache.pool.num_free == num_blocks
