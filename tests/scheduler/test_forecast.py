import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler import length_curve
from quire.scheduler.forecast import QUANTILES, Forecast, Outlook, peak_blocks
from tests.scheduler.checked_engine import Engine, new_request

OUTLOOKS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: Outlook(*pair)), max_size=12)


@given(OUTLOOKS, st.integers(0, 100))
def test_the_peak_is_that_of_going_through_the_steps(outlooks: list[Outlook], others: int) -> None:
    """Blocks of one token. A sequence that ends gives back all its blocks."""
    used = others + sum(outlook.num_blocks for outlook in outlooks)
    peak = most = peak_blocks(used, outlooks, 1)
    seen = used
    for step in range(21):
        alive = [outlook for outlook in outlooks if outlook.num_tokens_to_come >= step]
        seen = max(seen, others + sum(outlook.num_blocks + step for outlook in alive))
    assert most == peak == seen


def test_preemptions_raise_the_quantile_and_calm_lowers_it() -> None:
    forecast = Forecast(BlockPool(8, 4))
    first = forecast.quantile
    forecast.note_preemption()
    assert forecast.quantile > first
    for _ in range(10_000):
        forecast.note_end()
    assert forecast.quantile == QUANTILES[0]
    for _ in range(10_000):
        forecast.note_preemption()
    assert forecast.quantile == QUANTILES[1]


def preemptions_of(admission: str) -> tuple[int, int]:
    """Prompts of one block that all grow to six, in a pool of forty: preemptions and steps."""
    engine = Engine(40, 4, max_num_seqs=32, max_num_batched_tokens=64, enable_prefix_caching=False, admission=admission)
    draw, number = random.Random(1), 0
    while number < 200 or engine.scheduler.has_work:
        while number < 200 and len(engine.clients) < 40:
            engine.add(new_request(f"{number}", 4, max_tokens=draw.randint(18, 22)))
            number += 1
        engine.step()
    return engine.scheduler.stats().total_preemptions, engine.num_steps


def test_what_will_not_fit_is_not_begun() -> None:
    """Everybody looks small when it comes. The lengths are learnt from the first that end."""
    now, num_steps = preemptions_of("current")
    predicted, num_steps_predicted = preemptions_of("predicted")
    assert now > 100
    assert predicted < now / 2
    assert num_steps_predicted < 1.4 * num_steps


def test_nothing_is_refused_while_nothing_is_known_or_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_curve, "MIN_ANSWERS", 1)
    engine = Engine(4, 4, max_num_seqs=4, admission="predicted")
    for name in "ab":
        engine.add(new_request(name, 4, max_tokens=8))
    engine.step()
    assert engine.scheduler.stats().num_running == 2  # both would need three blocks, of four
    engine.run()
    for name in "cd":
        engine.add(new_request(name, 4, max_tokens=8))
    engine.step()
    assert engine.scheduler.stats().num_running == 1
    engine.run()
