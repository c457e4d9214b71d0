"""What steps take, by their number of tokens."""

import pytest

from quire.scheduler.step_times import StepCurve, StepTimes


def test_times_between_those_measured() -> None:
    curve = StepCurve([(2, 10.0), (4, 20.0), (8, 30.0)])
    assert [curve.seconds(num) for num in (1, 2, 3, 4, 6, 8, 100)] == pytest.approx([10, 10, 15, 20, 25, 30, 30])
    assert curve.best_rate(2, 16) == pytest.approx(16 / 30)
    assert curve.best_rate(2, 4) == pytest.approx(0.2)


def test_no_step_is_slower_than_one_of_more_tokens() -> None:
    curve = StepCurve([(1, 9.0), (2, 70.0), (4, 10.0), (8, 12.0)])
    assert [curve.seconds(num) for num in (1, 2, 3, 4, 8)] == pytest.approx([9, 10, 10, 10, 12])


def test_a_plain_step_after_drafts_is_not_what_drafts_are_compared_with() -> None:
    times = StepTimes()
    for drafted, seconds in ((False, 1.0), (False, 1.0), (True, 9.0), (False, 5.0), (True, 9.0), (False, 5.0)):
        times.measure(4 if drafted else 1, seconds, 0.0, drafted=drafted)
    assert times.curve(1, 0.0) is None
    times.measure(1, 1.0, 0.0)
    curve = times.curve(1, 0.0)
    assert curve is not None
    assert (curve.seconds(1), curve.seconds(4)) == (1.0, 9.0)
