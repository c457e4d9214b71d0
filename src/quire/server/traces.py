"""Traces: a span of OpenTelemetry for each prompt that the engine answers, under the names of gen_ai and of vLLM.

A span continues the trace that the request's `traceparent` header names. No prompt and no answer is sent. The packages
of OpenTelemetry are imported by `Traces.open` alone, with --otlp-traces-endpoint; sampler, headers and the service's
name come from their variables (OTEL_…).
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from quire import __version__
from quire.errors import ConfigError
from quire.outputs import RequestMetrics
from quire.sampling_params import SamplingParams
from quire.server import logs
from quire.server.settings import ServerSettings

SPAN = "llm_request"
"""The name of a span, as vLLM has it."""
_TRACES_PATH = "/v1/traces"
_FLUSH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class TracedAnswer:
    """One prompt's answer as its span tells it."""

    params: SamplingParams
    finish_reasons: Sequence[str]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    times: RequestMetrics | None

    def seconds(self, begin: str, end: str) -> float | None:
        """Seconds between two of `RequestMetrics`' times; None if one is missing."""
        first, last = getattr(self.times, begin, None), getattr(self.times, end, None)
        return None if first is None or last is None else last - first


_Read = Callable[[TracedAnswer], Any]


def _param(name: str) -> _Read:
    return lambda answer: getattr(answer.params, name)


def _seconds(begin: str, end: str) -> _Read:
    return lambda answer: answer.seconds(begin, end)


_ROWS: tuple[tuple[str, _Read], ...] = (
    # The semantic conventions of gen_ai.
    ("gen_ai.request.temperature", _param("temperature")),
    ("gen_ai.request.top_p", _param("top_p")),
    ("gen_ai.request.top_k", _param("top_k")),
    ("gen_ai.request.max_tokens", _param("max_tokens")),
    ("gen_ai.request.seed", _param("seed")),
    ("gen_ai.request.frequency_penalty", _param("frequency_penalty")),
    ("gen_ai.request.presence_penalty", _param("presence_penalty")),
    ("gen_ai.request.choice.count", _param("n")),
    ("gen_ai.usage.input_tokens", lambda answer: answer.num_prompt_tokens),
    ("gen_ai.usage.output_tokens", lambda answer: answer.num_generated_tokens),
    ("gen_ai.usage.cache_read.input_tokens", lambda answer: answer.num_cached_tokens),
    ("gen_ai.response.finish_reasons", lambda answer: list(answer.finish_reasons) or None),
    # vLLM's own.
    ("gen_ai.request.n", _param("n")),
    ("gen_ai.usage.num_sequences", _param("n")),
    ("gen_ai.usage.prompt_tokens", lambda answer: answer.num_prompt_tokens),
    ("gen_ai.usage.completion_tokens", lambda answer: answer.num_generated_tokens),
    ("gen_ai.latency.time_in_queue", _seconds("arrival_time", "first_scheduled_time")),
    ("gen_ai.latency.time_to_first_token", _seconds("arrival_time", "first_token_time")),
    ("gen_ai.latency.e2e", _seconds("arrival_time", "last_token_time")),
    ("gen_ai.latency.time_in_model_prefill", _seconds("first_scheduled_time", "first_token_time")),
    ("gen_ai.latency.time_in_model_decode", _seconds("first_token_time", "last_token_time")),
    ("gen_ai.latency.time_in_model_inference", _seconds("first_scheduled_time", "last_token_time")),
)
"""Attribute → how it is read. None leaves it out."""


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The trace that one HTTP request belongs to. Each of its prompts becomes a span."""

    _traces: "Traces"
    _parent: Any
    _attributes: Mapping[str, str]

    def begin(self) -> "PromptSpan":
        return PromptSpan(self._traces, self._parent, self._attributes)


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """The span of one prompt, from now on."""

    _traces: "Traces"
    _parent: Any
    _attributes: Mapping[str, str]
    _begun: int = field(default_factory=time.time_ns)

    def end(self, answer: TracedAnswer) -> None:
        """End it now, with the exception that is being handled as its error, if there is one."""
        self._traces.record(self._parent, self._begun, self._attributes, answer, sys.exception())


class Traces:
    """Sends spans to one collector, from a thread of the OpenTelemetry package; `close` sends the last ones."""

    @classmethod
    def open(cls, settings: ServerSettings) -> "Traces | None":
        """None without `otlp_traces_endpoint`. Raises `ConfigError` if the packages are missing."""
        return None if settings.otlp_traces_endpoint is None else cls(settings.otlp_traces_endpoint)

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint needs a package that is missing ({error.name}): pip install 'quire-llm[otel]'"
            ) from None
        address = endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}{_TRACES_PATH}"
        name = os.environ.get("OTEL_SERVICE_NAME", "quire")
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
        self._tracer = self._provider.get_tracer("quire", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._kind = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR

    def request(self, headers: Sequence[tuple[bytes, bytes]], *, operation: str, model: str) -> RequestTrace:
        """The trace of a request with these headers; a new one if they name none."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "quire",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.id": logs.request_id.get(),
        }
        return RequestTrace(self, self._propagator.extract(carrier), attributes)

    def record(
        self,
        parent: Any,
        begun: int,
        attributes: Mapping[str, str],
        answer: TracedAnswer,
        error: BaseException | None,
    ) -> None:
        """Add the span of an answer that began at `begun` (nanoseconds of Unix time) and ends now."""
        span = self._tracer.start_span(SPAN, context=parent, kind=self._kind, start_time=begun, attributes=attributes)
        if span.is_recording():
            read = {name: value for name, row in _ROWS if (value := row(answer)) is not None}
            span.set_attributes(read)
            if error is not None:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._error, _described(error))
        span.end()

    async def close(self) -> None:
        """Send what is left, for some seconds at most."""
        await asyncio.to_thread(self._provider.force_flush, int(_FLUSH_SECONDS * 1000))
        await asyncio.to_thread(self._provider.shutdown)


def _described(error: BaseException) -> str:
    """A cancelled stream says that the client left; its exception has no words."""
    gone = isinstance(error, (GeneratorExit, asyncio.CancelledError))
    return "the client left before the answer was complete" if gone else str(error)
