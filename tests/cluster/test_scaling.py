"""Autoscaling by the engine's numbers, without Ray."""

from types import SimpleNamespace

import pytest

from quire.cluster.scaling import EngineNumbers, wanted_replicas

TARGETS = {"target_queue_seconds": 2.0, "target_kv_share": 0.8}


@pytest.mark.parametrize(
    ("current", "queue_seconds", "kv_share", "wanted"),
    [
        (2, 0.0, 0.0, 1),  # nothing to do
        (2, 1.5, 0.3, 2),  # below the target, but with half the replicas above it
        (2, 2.0, 0.1, 2),  # at the target
        (2, 4.0, 0.1, 4),  # twice the target
        (3, 0.0, 1.2, 5),  # more KV predicted than there is
        (4, 0.4, 0.1, 2),  # a fifth of the target
        (1, 0.0, 0.0, 1),  # never none
    ],
)
def test_replicas_bring_both_numbers_to_their_targets(
    current: int, queue_seconds: float, kv_share: float, wanted: int
) -> None:
    means = {"queue_seconds": queue_seconds, "kv_share": kv_share}
    assert wanted_replicas(current, means, **TARGETS) == wanted


@pytest.mark.parametrize("load", [0.1, 0.3, 0.5, 0.9, 1.3, 3.0, 20.0])
@pytest.mark.parametrize("current", [1, 2, 5, 40])
def test_the_number_settles(current: int, load: float) -> None:
    """The same load spread over the new number of replicas asks for no further change."""
    total = load * current
    first = wanted_replicas(current, {"kv_share": 0.8 * total / current}, **TARGETS)
    assert wanted_replicas(first, {"kv_share": 0.8 * total / first}, **TARGETS) == first


def context_of(queue_seconds: list[float], *, running: int, target: int) -> SimpleNamespace:
    per_replica = {f"r{number}": seconds for number, seconds in enumerate(queue_seconds)}
    return SimpleNamespace(
        aggregated_metrics={"queue_seconds": per_replica} if per_replica else {},
        current_num_replicas=running,
        target_num_replicas=target,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
    )


@pytest.mark.parametrize(
    ("queue_seconds", "running", "target", "wanted"),
    [
        ([100.0, 100.0], 2, 2, 5),  # the most that is allowed
        ([0.0, 0.0], 2, 2, 1),
        ([0.0], 1, 2, 2),  # a rolling update replaces one: the other must go on
        ([0.0], 2, 2, 2),  # the second has not said anything yet
        ([], 0, 3, 3),  # all start
        ([8.0], 1, 2, 4),  # too much work for both
        ([0.0, 0.0, 0.0], 3, 2, 1),  # one drains already
    ],
)
def test_the_policy_keeps_to_serves_limits_and_stops_none_while_others_start(
    queue_seconds: list[float], running: int, target: int, wanted: int
) -> None:
    context = context_of(queue_seconds, running=running, target=target)
    assert EngineNumbers()(context) == (wanted, {})
