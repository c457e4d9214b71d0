"""The estimate against its definition, written out with fractions, and against what it is for: an unbiased length."""

import random
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quire.scheduler.length_curve import MIN_ANSWERS, WINDOW, Answer, Ending, LengthClass, LengthCurve

ANSWERS = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from(list(Ending))).map(lambda pair: Answer(*pair)), max_size=40
)
LIMIT = 50


def share_longer(answers: list[Answer], length: int) -> Fraction:
    """Kaplan and Meier's product: for each length, the share of answers not ended before it that went past it."""
    share = Fraction(1)
    for at in range(1, length + 1):
        at_risk = [answer for answer in answers if answer.length >= at]
        num_ended = sum(answer.length == at and answer.ending is Ending.NATURAL for answer in at_risk)
        if num_ended:
            share *= 1 - Fraction(num_ended, len(at_risk))
    return share


@given(ANSWERS, st.integers(1, 19), st.integers(0, 35))
@example([Answer(length, Ending.NATURAL) for length in (1, 2, 3, 3)] + 3 * [Answer(3, Ending.LIMIT)], 10, 1)
def test_quantiles_are_those_of_the_product(answers: list[Answer], twentieths: int, beyond: int) -> None:
    curve = LengthCurve(answers)
    found = curve.quantile(twentieths / 20, beyond, LIMIT)
    assert beyond < found <= LIMIT
    left = share_longer(answers, beyond)
    wanted = (1 - Fraction(twentieths, 20)) * left
    reached = [length for length in range(beyond + 1, 31) if share_longer(answers, length) <= wanted]
    nearly = [length for length in range(beyond + 1, 31) if abs(share_longer(answers, length) - wanted) < 1e-9]
    if left and reached:
        assert found == reached[0] or found in nearly
    else:
        natural = [answer.length for answer in answers if answer.ending is Ending.NATURAL]
        longest = max(answers, key=lambda answer: (answer.length, answer.ending is Ending.LIMIT), default=None)
        goes_on = longest is None or not natural or longest.ending is Ending.LIMIT
        assert found == (LIMIT if goes_on else min(LIMIT, 2 * max(beyond, *natural))) or found in nearly


@given(ANSWERS, st.integers(0, 28), st.integers(1, 60))
def test_means_are_sums_of_the_product(answers: list[Answer], beyond: int, limit: int) -> None:
    natural = [answer.length for answer in answers if answer.ending is Ending.NATURAL]
    beyond = min(beyond, limit - 1)
    mean = LengthCurve(answers).mean(beyond, limit)
    assert beyond <= mean <= limit
    left = share_longer(answers, beyond)
    # Where the estimate does not reach zero, what is past the last ending is a guess with its own test.
    if natural and left and beyond < max(natural) and not share_longer(answers, max(natural)):
        expected = beyond + sum(share_longer(answers, length) / left for length in range(beyond, limit))
        assert mean == pytest.approx(float(min(expected, limit)))


def test_nothing_known_goes_to_the_limit() -> None:
    assert LengthCurve([]).quantile(0.1, 0, 99) == 99
    assert LengthCurve([]).mean(7, 99) == 99


def test_where_all_are_cut_off_the_next_will_be() -> None:
    """Clients that ignore the end of text and say how much they want are predicted exactly."""
    curve = LengthCurve([Answer(64, Ending.LIMIT)] * 40)
    assert curve.quantile(0.2, 10, 64) == 64
    assert curve.mean(10, 64) == 64


def test_past_all_experience_as_much_again_is_expected() -> None:
    curve = LengthCurve([Answer(length, Ending.NATURAL) for length in (10, 20, 30)])
    assert curve.quantile(0.5, 40, 1000) == 80
    assert curve.quantile(0.5, 40, 50) == 50


def test_answers_that_still_run_count() -> None:
    """Soon after a start only short answers have ended. Their mean is far off, the estimate is not."""
    draw = random.Random(0)
    lengths = [1 + int(draw.expovariate(1 / 300)) for _ in range(4000)]
    now = 200
    ended = [length for length in lengths if length <= now]
    seen = [Answer(length, Ending.NATURAL) if length <= now else Answer(now, Ending.ABORTED) for length in lengths]
    truth = sorted(lengths)[len(lengths) * 4 // 10]
    assert sorted(ended)[len(ended) * 4 // 10] < 0.6 * truth
    assert LengthCurve(seen).quantile(0.4, 0, 4096) == pytest.approx(truth, rel=0.05)


class Running:
    def __init__(self, num_output_tokens: int) -> None:
        self.num_output_tokens = num_output_tokens


def test_a_class_is_believed_when_it_has_shown_enough_and_follows_a_shift() -> None:
    known = LengthClass()
    for _ in range(MIN_ANSWERS - 1):
        known.add(Answer(10, Ending.NATURAL))
        assert known.curve is None
    known.add(Answer(10, Ending.NATURAL))
    assert known.curve is not None
    assert known.curve.quantile(0.5, 0, LIMIT) == 10
    for _ in range(WINDOW):
        known.add(Answer(20, Ending.NATURAL))
    assert known.curve.quantile(0.01, 0, LIMIT) == 20


def test_a_class_counts_those_that_run_when_its_curve_is_drawn() -> None:
    known = LengthClass()
    for _ in range(MIN_ANSWERS):
        known.add(Answer(10, Ending.NATURAL))
    for _ in range(9 * MIN_ANSWERS):
        known.running[Running(11)] = None
    assert known.curve is not None
    assert known.curve.quantile(0.5, 0, 1000) > 10
