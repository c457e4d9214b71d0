"""What users are told to expect: by hand where that can be done, and in order where it cannot."""

from dataclasses import replace

import pytest

from quire.errors import ConfigError
from quire.simulation import planner
from quire.simulation.planner import EngineSizes, expect_trace, expect_users
from quire.simulation.step_time import StepTime
from tests.simulation.traces import SLOW, TINY, lengths

SIZES = EngineSizes(num_blocks=64, block_size=16, max_num_seqs=32, max_num_batched_tokens=128, max_model_len=256)


def test_how_many_users_fit() -> None:
    assert SIZES.num_users(256) == 4
    assert SIZES.num_users(17) == 32  # of 2 blocks each
    assert SIZES.num_users(10_000) == 0


def test_one_user_waits_for_nobody() -> None:
    step = StepTime(TINY, SLOW)
    first = step.seconds(1, 40, 40, 40 * 41 / 2, 1)
    rest = sum(step.seconds(1, 1, 40 + done, 40 + done, 1) for done in range(1, 10))
    figures = expect_users(TINY, SLOW, 1, SIZES, users=1, prompt=40, output=10)
    assert figures["ttft_p50"] == pytest.approx(first)
    assert figures["tokens_per_s"] == pytest.approx(10 / (first + rest))
    assert (figures["users"], figures["prompt"], figures["output"], figures["preemptions"]) == (1, 40, 10, 0)


def test_more_users_more_tokens_and_later_ones() -> None:
    rows = [expect_users(TINY, SLOW, 1, SIZES, users=users, prompt=16, output=16) for users in (1, 4, 16)]
    assert [row["mean_batch"] for row in rows] == sorted(row["mean_batch"] for row in rows)
    assert rows[2]["tokens_per_s"] > rows[1]["tokens_per_s"] > rows[0]["tokens_per_s"]
    assert rows[2]["tbt_p99"] > rows[0]["tbt_p99"]


def test_the_rate_is_the_same_however_long_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes first, and what comes after the last request that is measured, has no part in it."""
    found = []
    for rounds in (2, 8):
        monkeypatch.setattr(planner, "ROUNDS", rounds)
        figures = expect_users(TINY, SLOW, 1, replace(SIZES, num_blocks=256), users=16, prompt=64, output=32)
        found.append(figures["tokens_per_s"])
        assert figures["mean_batch"] == pytest.approx(16, rel=0.02)
    assert found == pytest.approx([found[1]] * 2, rel=0.02)


def test_a_trace_runs_at_its_own_arrivals() -> None:
    figures = expect_trace(lengths(40, arrivals=True), TINY, SLOW, 1, SIZES)
    assert not figures["saturate"]
    assert expect_trace(lengths(40), TINY, SLOW, 1, SIZES)["saturate"]


def test_a_pool_without_a_block_is_refused() -> None:
    none = EngineSizes(num_blocks=0, block_size=16, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=16)
    with pytest.raises(ConfigError):
        expect_users(TINY, SLOW, 1, none, users=1, prompt=4, output=4)
