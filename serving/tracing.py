"""OpenTelemetry spans of requests, where they are asked for: the request, and its phases below it.

They are asked for by `tracing` of the service or by `OTEL_EXPORTER_OTLP_ENDPOINT`, and need the extra
`tracing` (the OTLP exporter). A caller's own decision counts: its request is traced if its `traceparent` says
that the trace is sampled; `sample` is for requests that come without one.

A span is made after the answer, from times that were taken anyway, so that a request which isn't traced
costs a look at its headers, and one that is doesn't wait. Knows nothing of models.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from cluster.clock import SYSTEM_CLOCK, Clock
from serving.http import Request
from serving.service import TracingSettings
from serving.trace_context import TRACEPARENT, read

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger("tandem.serving")

ENVIRONMENT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_NS = 1e9
_SERVER_ERROR = 500


class Spans:
    """One replica's.

    Args:
        exporter: where finished spans go.
        sample: as `TracingSettings` has it.
        model: the name of the model.
        batched: hand them over in batches, by a thread; else at once.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        sample: float,
        model: str,
        *,
        batched: bool = True,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        resource = Resource.create({"service.name": "tandem", "tandem.model": model})
        self._provider = TracerProvider(
            resource=resource, sampler=ParentBased(TraceIdRatioBased(sample)), shutdown_on_exit=False
        )
        processor = BatchSpanProcessor(exporter) if batched else SimpleSpanProcessor(exporter)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tandem.serving")
        self._sample = sample
        self._model = model
        self._clock = clock

    def answered(self, request: Request, route: str, status: int, duration_s: float) -> str:
        """Make the spans of a request that is traced; gives its trace's id, empty where it has none."""
        if TRACEPARENT not in request.headers and not self._sample:
            return ""
        ended_ns = int(self._clock.wall().timestamp() * _NS)
        return self._trace(request, route, status, ended_ns - int(duration_s * _NS), ended_ns)

    def stop(self) -> None:
        """Hand over what is left."""
        self._provider.shutdown()

    def _trace(self, request: Request, route: str, status: int, began_ns: int, ended_ns: int) -> str:
        from opentelemetry import trace

        account = request.account
        span = self._tracer.start_span(
            f"{request.method} {route}",
            context=_parent(request),
            kind=trace.SpanKind.SERVER,
            start_time=began_ns,
            attributes={
                "http.request.method": request.method,
                "http.response.status_code": status,
                "tandem.model": self._model,
                "tandem.version": account.version,
                "tandem.rows": account.rows,
                "tandem.request_id": request.id,
            },
        )
        if span.is_recording():
            if status >= _SERVER_ERROR:
                span.set_status(trace.StatusCode.ERROR)
            self._phases(trace.set_span_in_context(span), request, ended_ns)
        span.end(ended_ns)
        return f"{span.get_span_context().trace_id:032x}"

    def _phases(self, context: Any, request: Request, ended_ns: int) -> None:
        """Laid end to end backwards from the answer, which was sent as soon as it was encoded."""
        account = request.account
        seconds = {
            "decode": account.decode_s,
            "queue": account.queue_s,
            "run": account.run_s,
            "encode": account.encode_s,
        }
        at_ns = ended_ns - int(sum(seconds.values()) * _NS)
        for name, duration_s in seconds.items():
            if duration_s:
                child = self._tracer.start_span(name, context=context, start_time=at_ns)
                at_ns += int(duration_s * _NS)
                child.end(at_ns)


def _parent(request: Request) -> Any:
    """The caller's span as OpenTelemetry has it, or an empty context where it sent none that is sound."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    given = read(request.headers)
    if given is None:
        return Context()
    remote = trace.SpanContext(
        int(given.trace_id, 16),
        int(given.parent_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(given.flags & trace.TraceFlags.SAMPLED),
        trace_state=trace.TraceState.from_header([given.state]) if given.state else None,
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(remote), Context())


def open_spans(settings: TracingSettings, model: str) -> Spans | None:
    """Spans, where they are asked for and can be sent."""
    endpoint = settings.endpoint or os.environ.get(ENVIRONMENT)
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        logger.warning("no spans are sent to %s: install tandem-ray[tracing]", endpoint)
        return None
    url = f"{endpoint.rstrip('/')}/v1/traces"
    return Spans(OTLPSpanExporter(endpoint=url), settings.sample, model)
