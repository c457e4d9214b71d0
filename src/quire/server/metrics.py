"""/metrics: counters of engine, server and named API keys, in Prometheus' text format or in OpenMetrics.

`engine.metrics` counts for the whole server; a key that is no admin's sees its own counters only.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
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
_TEXT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS_TYPE = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
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


class _Together(Collector):
    """Several collectors as one, so that an answer has one end."""

    def __init__(self, parts: Iterable[Collector]) -> None:
        self._parts = tuple(parts)

    def collect(self) -> Iterable[Metric]:
        for part in self._parts:
            yield from part.collect()


async def get_metrics(context: RequestContext) -> None:
    use = context.key_use
    parts: list[Collector] = [context.engine.metrics] if use.sees_all else []
    shown = context.services.keys.named if use.sees_all else [use]
    if shown:
        parts.append(_KeyCounters(shown))
    accept = dict(context.scope["headers"]).get(b"accept", b"").decode("latin-1")
    if prefers_openmetrics(accept):
        # All names are ones that every Prometheus takes, colons included; the default would replace the colons.
        body = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
            _Together(parts), escaping=openmetrics.ALLOWUTF8
        )
        await context.reply_bytes(body, _OPENMETRICS_TYPE)
    else:
        await context.reply_bytes(generate_latest(_Together(parts)), _TEXT_TYPE)


def prefers_openmetrics(accept: str) -> bool:
    """Whether the header Accept prefers OpenMetrics 1.0 to Prometheus' text format, or is content with either and names
    OpenMetrics."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for item in accept.split(","):
        kind, *rest = (part.strip().lower() for part in item.split(";"))
        options = dict(part.split("=", 1) for part in rest if "=" in part)
        try:
            weight = float(options.get("q", 1))
        except ValueError:
            continue
        if kind in weights and options.get("version", "1.0.0") in ("1.0.0", "0.0.4"):
            weights[kind] = max(weights[kind], weight)
    openmetrics_weight, text_weight = weights.values()
    return openmetrics_weight > 0 and openmetrics_weight >= text_weight


ENDPOINTS = (Endpoint("GET", "/metrics", get_metrics, "Metrics in Prometheus' text format or in OpenMetrics"),)
