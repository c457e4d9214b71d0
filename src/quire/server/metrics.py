"""/metrics: counters of engine and server in Prometheus' text format, and of each API key that has a name.

`engine.metrics` counts for the whole server; a key that is no admin's sees its own counters only.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from quire.server.endpoint import Endpoint, RequestContext
from quire.server.key_use import KeyUse

_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]
_ROWS: tuple[tuple[_Family, str, str, Callable[[KeyUse], int]], ...] = (
    (GaugeMetricFamily, "requests_running", "Requests being answered.", lambda use: use.num_requests),
    (GaugeMetricFamily, "prompts_waiting", "Prompts without output yet.", lambda use: use.num_waiting),
    (CounterMetricFamily, "requests", "Requests that have ended.", lambda use: use.num_ended),
    (CounterMetricFamily, "prompt_tokens", "Tokens of prompts.", lambda use: use.num_prompt_tokens),
    (CounterMetricFamily, "generated_tokens", "Tokens of answers.", lambda use: use.num_generated_tokens),
)
_REFUSED = "Requests refused, by the limit that they met."


class _KeyCounters(Collector):
    """The counters of some keys, labelled with the keys' names."""

    def __init__(self, uses: Sequence[KeyUse]) -> None:
        self._uses = uses

    def collect(self) -> Iterable[Metric]:
        for kind, name, about, read in _ROWS:
            family = kind(f"quire:key_{name}", about, labels=["key"])
            for use in self._uses:
                family.add_metric([use.key.name], read(use))
            yield family
        refused = CounterMetricFamily("quire:key_requests_refused", _REFUSED, labels=["key", "limit"])
        for use in self._uses:
            for limit, count in use.num_refused.items():
                refused.add_metric([use.key.name, limit], count)
        yield refused


async def get_metrics(context: RequestContext) -> None:
    metrics, use = context.engine.metrics, context.key_use
    body = metrics.render() if use.sees_all else b""
    shown = context.services.keys.named if use.sees_all else [use]
    if shown:
        registry = CollectorRegistry()
        registry.register(_KeyCounters(shown))
        body += generate_latest(registry)
    await context.reply_bytes(body, metrics.content_type.encode())


ENDPOINTS = (Endpoint("GET", "/metrics", get_metrics, "Metrics in Prometheus' text format"),)
