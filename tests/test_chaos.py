"""A minute of `make chaos` and `make soak`, made short: the real engine, every kind of request, a few faults."""

import asyncio
import random
import sys

import pytest

from benchmarks import chaos, soak
from tests.engine.serving import OPTIONS


@pytest.mark.skipif(sys.platform != "linux", reason="stops and inspects processes through /proc")
@pytest.mark.parametrize(("images", "seconds"), [(False, 6.0), (True, 3.0)])
def test_streams_of_every_kind_survive_faults(monkeypatch: pytest.MonkeyPatch, images: bool, seconds: float) -> None:
    random.seed(1)
    monkeypatch.setattr(chaos, "FAULTS", ("kill", "segv"))
    tally = asyncio.run(chaos.chaos(seconds=seconds, every=seconds / 2, streams=8, images=images, **OPTIONS))
    assert tally.faults >= 1
    assert tally.right >= 8
    assert (tally.wrong, tally.lost) == ([], [])


@pytest.mark.skipif(sys.platform != "linux", reason="reads processes in /proc")
def test_a_server_ends_a_short_soak_as_it_began() -> None:
    flags = ("--num-blocks", "400")
    sizes = {"requests": 60, "disconnects": 30, "num_silent": 8, "num_large": 2, "last_streams": 10, "warm": 60}
    wrong = asyncio.run(soak.soak(**sizes, silent_seconds=0.5, flags=flags))
    assert [line for line in wrong if "MiB" not in line] == [], "memory settles only after some hundred requests"
