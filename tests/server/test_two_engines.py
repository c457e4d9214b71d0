"""TwoEngines: what the state of two engines means for clients."""

from types import SimpleNamespace
from typing import Any

import pytest

from quire.server.two_engines import TwoEngines


def engine(name: str, state: str, *, advances: bool) -> Any:
    return SimpleNamespace(model_names=[name], other_names=(), state=state, advances=advances, outage=None)


@pytest.mark.parametrize(
    ("chat", "advances", "vectors", "state", "healthy"),
    [
        ("ready", True, "ready", "ready", True),
        ("ready", True, "loading", "loading", False),
        ("loading", False, "ready", "loading", False),
        ("ready", False, "ready", "ready", False),
        ("restarting", False, "ready", "restarting", False),
        ("ready", True, "restarting", "ready", True),  # streams go on while the embedder comes back
        ("draining", True, "draining", "draining", True),
    ],
)
def test_health_waits_for_both(chat: str, advances: bool, vectors: str, state: str, healthy: bool) -> None:
    both = TwoEngines(engine("chat", chat, advances=advances), engine("vectors", vectors, advances=True))
    assert (both.state, both.advances) == (state, healthy)
    assert (both._first.other_names, both.vectors.other_names) == (["vectors"], ["chat"])
