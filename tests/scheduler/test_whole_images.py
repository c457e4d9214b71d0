"""Images whose tokens see each other: whatever the budget, the pool and the neighbours, no chunk ends inside one."""

import random
from dataclasses import replace

import pytest

from quire.image_input import ImagePixels
from quire.kv_cache.block_pool import BlockPool
from quire.request import BACKGROUND, InputSpan, Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepResult

IMAGE, NUM_SEQS = 16, 4
PIXELS = ImagePixels(b"\0" * 3, 1, 1, 1)


def request_with_images(number: int, dice: random.Random) -> Request:
    prompt: list[int] = []
    spans = []
    for _ in range(dice.randrange(4)):
        prompt += [dice.randrange(5, 100) for _ in range(dice.randrange(1, 30))]
        spans.append(InputSpan(bytes([dice.randrange(3)]) * 16, len(prompt), IMAGE))
        prompt += [3] * IMAGE
    prompt += [dice.randrange(5, 100) for _ in range(dice.randrange(1, 30))]
    length = dice.randrange(1, 40)
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    request = Request(
        request_id=f"r{number}",
        prompt_token_ids=prompt,
        params=params,
        max_tokens=length,
        inputs=tuple(spans),
        pixels=(PIXELS,) * len(spans),
    )
    return replace(request, priority=dice.choice([0, 0, BACKGROUND]), tenant=dice.choice(["a", "b"]))


@pytest.mark.parametrize("num_blocks", [60, 400])
@pytest.mark.parametrize("budget", [NUM_SEQS + IMAGE, 30, 64])
@pytest.mark.parametrize("seed", range(5))
def test_no_chunk_ends_inside_an_image(seed: int, budget: int, num_blocks: int) -> None:
    dice = random.Random(seed)
    limits = SchedulerLimits(
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=budget,
        max_model_len=256,
        max_kept_image_tokens=64,
        max_step_image_tokens=24,
        whole_images=True,
    )
    clock = iter(range(10**9))
    scheduler = Scheduler(BlockPool(num_blocks, 4), limits, clock=lambda: next(clock) * 1e-3)
    requests = [request_with_images(number, dice) for number in range(20)]
    spans_of_row: dict[int, tuple[InputSpan, ...]] = {}
    finished = 0
    for _ in range(5000):
        if requests and dice.random() < 0.3:
            scheduler.add(requests.pop())
        if not scheduler.has_work:
            continue
        plan = scheduler.schedule()
        for new in plan.new_rows:
            spans_of_row[new.row] = tuple(InputSpan(b"", offset, IMAGE) for offset, _, _ in new.images)
        assert plan.num_tokens <= budget
        for row, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            for span in spans_of_row[row]:
                assert not span.offset < start + count < span.offset + IMAGE
        num_samples = len(plan.sample_rows)
        drawn = [dice.randrange(5, 100) for _ in range(num_samples)]
        result = StepResult(token_ids=drawn, logprobs=[None] * num_samples, errors=[None] * num_samples)
        finished += sum(delta.finish_reason is not None for delta in scheduler.update(plan, result))
    assert finished == 20
