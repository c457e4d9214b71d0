"""A minute of `make chaos` and `make soak`, made short: the real engine, every kind of request, a few faults."""

import asyncio
import random
import sys

import pytest

from benchmarks import chaos
from tests.engine.serving import OPTIONS


@pytest.mark.skipif(sys.platform != "linux", reason="stops and inspects processes through /proc")
def test_streams_of_every_kind_survive_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(1)
    monkeypatch.setattr(chaos, "FAULTS", ("kill", "segv"))
    tally = asyncio.run(chaos.chaos(seconds=6.0, every=3.0, streams=8, **OPTIONS))
    assert tally.faults >= 1
    assert tally.right >= 8
    assert (tally.wrong, tally.lost) == ([], [])
