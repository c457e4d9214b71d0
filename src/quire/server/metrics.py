"""/metrics: counters of engine and server in Prometheus' text format. `engine.metrics` counts."""

from quire.server.endpoint import Endpoint, RequestContext


async def get_metrics(context: RequestContext) -> None:
    metrics = context.engine.metrics
    await context.reply_bytes(metrics.render(), metrics.content_type.encode())


ENDPOINTS = (Endpoint("GET", "/metrics", get_metrics, "Metrics in Prometheus' text format"),)
