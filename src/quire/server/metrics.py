"""/metrics: what the engine and the server count, in Prometheus' text format. `engine.metrics` does the counting."""

from quire.server.exchange import Endpoint, Exchange


async def get_metrics(exchange: Exchange) -> None:
    metrics = exchange.engine.metrics
    await exchange.reply_bytes(metrics.render(), metrics.content_type.encode())


ENDPOINTS = (Endpoint("GET", "/metrics", get_metrics, "Metrics in Prometheus' text format"),)
