"""FastHistogram: a Prometheus histogram for what happens thousands of times a second."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class FastHistogram(Collector):
    """An observation is a bisection. The library's histogram takes locks and searches from the first bucket."""

    def __init__(self, name: str, about: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        """`bounds` are the upper ends of the buckets, the smallest first; the last bucket has none."""
        self._name = name
        self._about = about
        self._labels = labels
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._about, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family
