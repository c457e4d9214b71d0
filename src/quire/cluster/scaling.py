"""Autoscaling by the engine's own numbers: predicted seconds in the queue, and the share of the KV cache in use."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

QUEUE_SECONDS, KV_SHARE = "queue_seconds", "kv_share"
_SPARE = 0.5
"""Replicas are removed only while both numbers are below this share of their targets: that leaves room for a change."""


def wanted_replicas(
    current: int, means: Mapping[str, float], *, target_queue_seconds: float, target_kv_share: float
) -> int:
    """How many replicas bring both means to their targets; `current` where a change would soon be undone."""
    ratio = max(means.get(QUEUE_SECONDS, 0.0) / target_queue_seconds, means.get(KV_SHARE, 0.0) / target_kv_share)
    if _SPARE <= ratio <= 1.0:
        return current
    wanted = math.ceil(current * ratio / (1.0 if ratio > 1.0 else _SPARE))
    return max(1, min(current, wanted) if ratio < 1.0 else max(current, wanted))


class EngineNumbers:
    """A policy of Serve's autoscaling, which calls it with its context."""

    def __init__(self, target_queue_seconds: float = 2.0, target_kv_share: float = 0.85) -> None:
        self._targets = {"target_queue_seconds": target_queue_seconds, "target_kv_share": target_kv_share}

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        numbers = context.aggregated_metrics or {}
        means = {name: _mean(per_replica) for name, per_replica in numbers.items()}
        wanted = wanted_replicas(max(1, context.current_num_replicas), means, **self._targets)
        num_known = min((len(per_replica) for per_replica in numbers.values()), default=0)
        if min(num_known, context.current_num_replicas) < context.target_num_replicas:
            # Some start or are being replaced. With a lower target Serve would stop the ones that answer.
            wanted = max(wanted, context.target_num_replicas)
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, low), high), {}


def _mean(per_replica: Mapping[Any, float] | Sequence[float]) -> float:
    values = list(per_replica.values()) if isinstance(per_replica, Mapping) else list(per_replica)
    return sum(values) / len(values) if values else 0.0
