"""OpenTelemetry spans, where they are asked for: one a request, with children ``queue``, ``encode``, ``denoise`` and
``decode`` for each of its pictures. A line of a batch, which no request waits for, has a span of its own like that.

Attributes have the names of the semantic conventions of HTTP servers and of generative AI (``gen_ai.*``; it has no
operation of its own for pictures: ``generate_content`` with ``gen_ai.output.type`` ``image``). W3C Trace Context comes
in with ``traceparent`` and goes back under the same name, and as ``traceresponse``, as the draft of its level 2 says.
A prompt is in a span only where that is asked for, too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from intaglio import __version__
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need
from intaglio.runtimes.serve_guard import OPEN, Scope
from intaglio.runtimes.serve_metrics import asked

if TYPE_CHECKING:
    from intaglio.runtimes.serve_hub import Hub

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SILENT = OPEN | {"/metrics"}  # asked every few seconds by machines
# Stages of `Clock` -> the span they are part of; text encoders have several names, and so have decoders.
SPANS = {"tokenize": "encode", "vae_encoder": "encode", "scheduler": "denoise", "denoiser": "denoise"}
ENCODERS = "text_encoder"
CHILDREN = ("encode", "denoise", "decode")
OPERATION = "generate_content"
LARGEST_INTEGER = 2**63  # of OTLP; seeds may be larger


def span_of(stage: str) -> str:
    """The span that a stage is part of."""
    return "encode" if stage.startswith(ENCODERS) else SPANS.get(stage, "decode")


def clock(moment: float) -> int:
    """A moment of the steady clock as nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)


class Traces:
    """A hub's listener that makes spans.

    Args:
        hub: that is watched; this becomes one of its listeners.
        provider: of OpenTelemetry's tracers.
        prompts: whether ``gen_ai.input.messages`` is set.
    """

    def __init__(self, hub: Hub, provider: Any, *, prompts: bool = False) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.trace, self.wire = trace, TraceContextTextMapPropagator()
        self.tracer, self.prompts = provider.get_tracer("intaglio", __version__), prompts
        self.begun: dict[str, float] = {}  # job -> when its worker began it
        self.spans: dict[str, Any] = {}  # request for pictures -> the span it belongs to
        self.own: set[str] = set()  # those of them that are nobody's request
        self.listeners: dict[str, Callable[..., None]] = {
            "asked": self.asked, "accepted": self.accepted, "begun": self.left_queue, "picture": self.picture,
            "ended": self.ended, "answered": self.answered,
        }  # fmt: skip
        hub.listeners.append(self.heard)

    def heard(self, what: str, facts: Mapping[str, Any]) -> None:
        """Something happened; see `Hub.tell`."""
        if what in self.listeners:
            self.listeners[what](**facts)

    def asked(self, scope: Scope) -> None:
        """A request came: its span begins, below the client's where it names one."""
        if scope["path"] in SILENT:
            return
        asked.set(scope)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        attributes = {"http.request.method": scope["method"], "url.scheme": scope["scheme"]}
        span = self.tracer.start_span(
            scope["method"], self.wire.extract(carrier), self.trace.SpanKind.SERVER, attributes=attributes
        )
        sent: dict[str, str] = {}
        self.wire.inject(sent, self.trace.set_span_in_context(span))
        scope["state"]["span"] = span
        value = sent.get("traceparent", "").encode()
        scope["state"]["headers"] = [(name, value) for name in (b"traceparent", b"traceresponse") if value]

    def accepted(self, ticket: Any) -> None:
        """A request for pictures was taken: it says what the span is about."""
        scope, order, name = asked.get(), ticket.order, ticket.model.name
        if scope is None:
            span = self.tracer.start_span(OPERATION)
            self.own.add(ticket.ident)
        else:
            span = scope["state"].get("span")
            if span is None:
                return
            scope["state"]["ticket_of_span"] = ticket
        self.spans[ticket.ident] = span
        span.update_name(f"{OPERATION} {name}")
        width, height = ticket.size
        span.set_attributes(
            {
                "gen_ai.operation.name": OPERATION, "gen_ai.provider.name": "intaglio", "gen_ai.request.model": name,
                "gen_ai.output.type": "image", "gen_ai.response.id": ticket.ident,
                "intaglio.backend": ticket.model.settings.backend, "intaglio.steps": ticket.steps,
                "intaglio.width": width, "intaglio.height": height,
            }
        )  # fmt: skip
        if order.count != 1:  # the conventions leave 1 out
            span.set_attribute("gen_ai.request.choice.count", order.count)
        if order.parameters["seed"] < LARGEST_INTEGER:
            span.set_attribute("gen_ai.request.seed", order.parameters["seed"])
        if self.prompts:
            part = [{"role": "user", "parts": [{"type": "text", "content": order.prompt}]}]
            span.set_attribute("gen_ai.input.messages", json.dumps(part, ensure_ascii=False))

    def left_queue(self, job: Any) -> None:
        """A picture's worker began it."""
        if job.ticket.ident in self.spans:
            self.begun[job.ident] = time.monotonic()
            self.child(job.ticket, "queue", job.ticket.arrival, self.begun[job.ident], job.index)

    def picture(self, ticket: Any, picture: Any) -> None:
        """A picture was made. How long its stages took is the worker's word; where they lie, their order's."""
        index = next(index for index, made in ticket.pictures.items() if made is picture)
        start = self.begun.pop(ticket.jobs[index].ident, None)
        if start is None:
            return
        spent = dict.fromkeys(CHILDREN, 0.0)
        for stage, seconds in picture.seconds.items():
            spent[span_of(stage)] += seconds
        for name, seconds in spent.items():
            self.child(ticket, name, start, start + seconds, index)
            start += seconds

    def child(self, ticket: Any, name: str, start: float, end: float, index: int) -> None:
        """A span below the request's, that is over."""
        context = self.trace.set_span_in_context(self.spans[ticket.ident])
        attributes = {"intaglio.picture": index}
        self.tracer.start_span(name, context, attributes=attributes, start_time=clock(start)).end(clock(end))

    def ended(self, ticket: Any, outcome: str) -> None:
        """A request for pictures ended."""
        span = self.spans.get(ticket.ident)
        for job in ticket.jobs.values() if span is not None else ():
            begun = self.begun.pop(job.ident, None)
            if begun is not None:
                self.child(ticket, "unfinished", begun, time.monotonic(), job.index)
            elif job.process is None:
                self.child(ticket, "queue", ticket.arrival, time.monotonic(), job.index)
        if span is not None and ticket.error is not None:
            self.fail(span, ticket.error.code, ticket.error.status)
        self.spans.pop(ticket.ident, None)
        if span is not None and ticket.ident in self.own:
            self.own.remove(ticket.ident)
            span.end()

    def answered(self, scope: Scope, status: int | None, seconds: float) -> None:
        """A request was answered: its span is over."""
        span, ticket = scope["state"].get("span"), scope["state"].get("ticket_of_span")
        if span is None:
            return
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.set_attribute("http.route", route)
            if ticket is None:
                span.update_name(f"{scope['method']} {route}")
        if status is not None:
            span.set_attribute("http.response.status_code", status)
            if status >= 400 and (ticket is None or ticket.error is None):
                self.fail(span, str(status), status)
        span.end()

    def fail(self, span: Any, kind: str, status: int) -> None:
        """Say that it went wrong; a client's own mistake is no error of a server's span."""
        span.set_attribute("error.type", kind)
        if status >= 500:
            span.set_status(self.trace.Status(self.trace.StatusCode.ERROR))


def trace(hub: Hub, *, prompts: bool = False) -> None:
    """Send spans of this hub by OTLP over HTTP, to where OpenTelemetry's own variables say.

    Raises:
        UsageError: they say nothing.
        MissingDependency: the SDK or the exporter is not installed.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        raise UsageError(f"--telemetry needs the variable {ENDPOINTS[0]}, for example http://localhost:4318")
    sdk = need("opentelemetry.sdk.trace", extra="telemetry")
    resources = need("opentelemetry.sdk.resources", extra="telemetry")
    exporter = need("opentelemetry.exporter.otlp.proto.http.trace_exporter", extra="telemetry")
    export = need("opentelemetry.sdk.trace.export", extra="telemetry")
    name = os.environ.get("OTEL_SERVICE_NAME", "intaglio")
    resource = resources.Resource.create({"service.name": name, "service.version": __version__})
    provider = sdk.TracerProvider(resource=resource)
    provider.add_span_processor(export.BatchSpanProcessor(exporter.OTLPSpanExporter()))
    Traces(hub, provider, prompts=prompts)
