"""FastHistogram against the library's histogram."""

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

from quire.engine.fast_histogram import FastHistogram

BOUNDS = (0.0025, 0.1, 1, 10)


def test_it_is_rendered_as_the_librarys_histogram() -> None:
    labels = {"model_name": "m", "engine": "0"}
    registries = CollectorRegistry(), CollectorRegistry()
    fast = FastHistogram("gap_seconds", "About", labels, BOUNDS)
    registries[0].register(fast)
    slow = Histogram("gap_seconds", "About", [*labels], buckets=BOUNDS, registry=registries[1]).labels(**labels)
    for value in (0.0, 0.0025, 0.0026, 0.1, 0.5, 1.0, 10.0, 11.0, 1e9):
        fast.observe(value)
        slow.observe(value)
    texts = [generate_latest(registry).decode().splitlines() for registry in registries]
    assert texts[0] == [line for line in texts[1] if "_created" not in line]
