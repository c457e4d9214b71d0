"""Which images a step encodes, and which embeddings stay."""

import pytest

from quire.image_input import ImagePixels, PlacedRows
from quire.request import InputSpan, Request
from quire.sampling_params import SamplingParams
from quire.scheduler.image_encoding import ImageEncoding
from quire.scheduler.limits import SchedulerLimits
from quire.step import StepPlan

PIXELS = ImagePixels(b"\0" * 3, 1, 1, 1)


def encoding(kept: int = 20, step: int = 10) -> ImageEncoding:
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)
    return ImageEncoding(
        SchedulerLimits(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            max_kept_image_tokens=kept,
            max_step_image_tokens=step,
        )
    )


def request(*spans: tuple[bytes, int, int], num_tokens: int = 100) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=[1] * num_tokens,
        params=SamplingParams(),
        inputs=tuple(InputSpan(*span) for span in spans),
        pixels=(PIXELS,) * len(spans),
    )


def encoded(plan: StepPlan) -> list[tuple[bytes, float]]:
    """(hash, how much is done) of the images that a step works on."""
    return [] if plan.images is None else [(order.content_hash, order.end) for order in plan.images.encoded]


def beside() -> StepPlan:
    """A step that computes another sequence."""
    return StepPlan(rows=[0], token_ids=[7])


def test_a_text_needs_nothing() -> None:
    plan = StepPlan()
    assert encoding().reach(plan, request(), 0, 50) == 50
    assert plan.images is None


def test_a_chunk_before_and_behind_an_image() -> None:
    asked = request((b"a", 10, 6))
    for start, count in ((0, 10), (16, 30)):
        plan = StepPlan()
        assert encoding().reach(plan, asked, start, count) == count
        assert plan.images is None


def test_borders_of_chunks_inside_an_image() -> None:
    encoder, asked, placed = encoding(), request((b"a", 10, 6)), []
    for start, count in ((0, 12), (12, 3), (15, 5)):
        plan = StepPlan(token_ids=[9, 9])
        assert encoder.reach(plan, asked, start, count) == count
        assert plan.images is not None
        placed += plan.images.placed
        assert encoded(plan) == ([(b"a", 6)] if start == 0 else [])
    assert placed == [PlacedRows(b"a", 0, 12, 2), PlacedRows(b"a", 2, 2, 3), PlacedRows(b"a", 5, 2, 1)]


def test_an_image_that_exceeds_the_budget_goes_on_in_the_next_step() -> None:
    encoder, asked = encoding(), request((b"a", 0, 6), (b"b", 8, 6))
    first, second = beside(), beside()
    assert encoder.reach(first, asked, 0, 50) == 8
    assert encoded(first) == [(b"a", 6), (b"b", 4)]
    assert encoder.reach(second, asked, 8, 50) == 50
    assert encoded(second) == [(b"b", 6)]


def test_nothing_is_computed_while_the_next_token_is_of_an_image_that_is_not_encoded() -> None:
    encoder, asked, steps = encoding(step=4), request((b"a", 3, 15)), []
    for _ in range(4):
        plan = beside()
        reached = encoder.reach(plan, asked, 3, 30)
        steps.append((reached, *encoded(plan)))
    assert steps == [(0, (b"a", 4)), (0, (b"a", 8)), (0, (b"a", 12)), (30, (b"a", 15))]
    assert encoder.num_encoded == 1


def test_two_sequences_share_the_budget_of_a_step() -> None:
    encoder, plan = encoding(), beside()
    assert encoder.reach(plan, request((b"a", 0, 6)), 0, 6) == 6
    assert encoder.reach(plan, request((b"b", 3, 6)), 3, 6) == 0
    assert encoder.reach(plan, request((b"c", 1, 6)), 0, 6) == 1
    assert encoded(plan) == [(b"a", 6), (b"b", 4)]


def test_a_step_that_computes_nothing_else_encodes_a_whole_image() -> None:
    plan = StepPlan()
    assert encoding(step=2).reach(plan, request((b"a", 0, 15)), 0, 20) == 20
    assert encoded(plan) == [(b"a", 15)]


def test_an_image_that_lost_its_place_begins_again() -> None:
    encoder, plan = encoding(step=4), beside()
    encoder.reach(plan, request((b"a", 0, 15)), 0, 15)
    alone, again = StepPlan(), beside()
    assert encoder.reach(alone, request((b"b", 0, 10)), 0, 10) == 10
    assert alone.images is not None
    assert alone.images.dropped == [b"a"]
    encoder.reach(again, request((b"a", 0, 15)), 0, 15)
    assert encoded(again) == [(b"a", 4)]


def test_the_same_image_is_encoded_once() -> None:
    encoder, plan = encoding(step=6), StepPlan()
    assert encoder.reach(plan, request((b"a", 0, 6), (b"a", 6, 6)), 0, 20) == 20
    assert encoder.reach(plan, request((b"a", 2, 6)), 0, 20) == 20
    assert encoded(plan) == [(b"a", 6)]
    assert encoder.num_encoded == 1


def test_the_least_recently_used_makes_room_and_what_the_step_uses_stays() -> None:
    encoder = encoding(kept=20, step=20)
    for name in (b"a", b"b"):
        encoder.reach(StepPlan(), request((name, 0, 8)), 0, 8)
    plan = StepPlan()
    assert encoder.reach(plan, request((b"a", 0, 8)), 0, 8) == 8
    assert encoder.reach(plan, request((b"c", 0, 8)), 0, 8) == 8
    assert plan.images is not None
    assert plan.images.dropped == [b"b"]
    assert encoder.reach(plan, request((b"d", 1, 8)), 0, 8) == 1  # a and c are in use
    assert plan.images.dropped == [b"b"]


@pytest.mark.parametrize("again", [b"a", b"z"])
def test_a_step_that_was_rolled_back_counts_for_nothing(again: bytes) -> None:
    encoder, plan, later = encoding(), StepPlan(), StepPlan()
    encoder.reach(plan, request((b"a", 0, 6)), 0, 6)
    encoder.roll_back(plan)
    encoder.reach(later, request((again, 0, 6)), 0, 6)
    encoder.finish(later)
    assert later.images is not None
    assert later.images.dropped == [b"a"]
    assert encoded(later) == [(again, 6)]


def decodes(num_seqs: int = 2) -> StepPlan:
    """A step in which sequences decode."""
    rows = list(range(num_seqs))
    return StepPlan(rows=rows, token_ids=[7] * num_seqs, sample_rows=rows.copy())


def run(encoder: ImageEncoding, asked: Request, rate: float, alone: float, num_steps: int) -> list[float]:
    """Seconds of steps beside which an image is encoded, on a machine that encodes `rate` tokens a second."""
    seconds = []
    for _ in range(num_steps):
        plan = decodes()
        encoder.reach(plan, asked, 0, 50)
        seconds.append(alone + (0.0 if plan.images is None else plan.images.num_encoded) / rate)
        encoder.measure(plan, seconds[-1])
    return seconds


@pytest.mark.parametrize("rate", [3.0, 40.0, 1000.0])
def test_beside_decoding_sequences_a_share_of_their_time_is_spent(rate: float) -> None:
    """Whatever the machine is good at; some steps encode nothing and show what the others would take without."""
    encoder, asked = encoding(kept=10**6, step=64), request((b"a", 0, 10**5), num_tokens=10**5)
    for _ in range(5):
        encoder.measure(decodes(), 0.04)
    seconds = run(encoder, asked, rate, 0.04, 60)[5:]
    assert max(seconds) <= 0.04 * 1.5
    assert sum(seconds) / len(seconds) > 0.04 * 1.15
    assert seconds.count(0.04) >= 3


def test_the_budget_follows_a_machine_that_becomes_slower() -> None:
    encoder, asked = encoding(kept=10**6, step=64), request((b"a", 0, 10**5), num_tokens=10**5)
    run(encoder, asked, 100.0, 0.04, 60)
    assert max(run(encoder, asked, 25.0, 0.08, 400)[-100:]) <= 0.08 * 1.5


def test_without_decoding_sequences_the_budget_is_that_of_a_step() -> None:
    encoder = encoding(step=10)
    encoder.measure(decodes(), 0.04)
    plan = beside()
    encoder.reach(plan, request((b"a", 0, 15)), 0, 15)
    assert encoded(plan) == [(b"a", 10)]


def test_encoding_goes_on_beside_prompts_that_never_end() -> None:
    """No step only decodes, so none shows what decoding takes."""
    encoder, asked, num_encoded = encoding(kept=10**6, step=64), request((b"a", 0, 10**5), num_tokens=10**5), 0.0
    for _ in range(100):
        plan = StepPlan(rows=[0, 1], token_ids=[7] * 31, sample_rows=[0])
        encoder.reach(plan, asked, 0, 50)
        num_encoded += 0.0 if plan.images is None else plan.images.num_encoded
        encoder.measure(plan, 0.04)
    assert num_encoded > 50


def whole(start: int, count: int, most: int, *, keeps_whole: bool = True) -> int:
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256, whole_images=keeps_whole)
    return ImageEncoding(limits).whole(request((b"a", 10, 6), (b"b", 20, 6)), start, count, most)


@pytest.mark.parametrize(
    ("start", "count", "most", "computed"),
    [
        (0, 5, 64, 5),
        (0, 10, 64, 10),  # up to the image
        (0, 11, 64, 16),  # its first token asks for all
        (0, 11, 15, 10),  # there is no room for it
        (10, 3, 5, 0),
        (10, 3, 6, 6),
        (12, 1, 4, 4),  # a hit ended inside it
        (12, 1, 3, 0),
        (12, 0, 0, 0),
        (0, 22, 26, 26),
        (0, 22, 25, 20),  # the first is computed, the second waits
        (0, 26, 26, 26),
        (0, 40, 40, 40),
    ],
)
def test_chunks_that_end_inside_no_image(start: int, count: int, most: int, computed: int) -> None:
    assert whole(start, count, most) == computed
    assert whole(start, count, most, keeps_whole=False) == count
