"""``/metrics``: what the server did and does, in Prometheus' text format or OpenMetrics, by the client's ``Accept``.

Every label takes few values: names of served artifacts, of protocols, of stages, outcomes and statuses. Nothing that a
client writes becomes one. Units are seconds and bytes; names follow prometheus.io/docs/practices/naming.
"""

from __future__ import annotations

import time
from collections import Counter as Numbers
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.responses import Response

from intaglio import __version__
from intaglio.profiles.registry import resolve
from intaglio.runtimes import serve_errors
from intaglio.runtimes.private_memory import held_bytes
from intaglio.runtimes.serve_errors import ServeError
from intaglio.runtimes.serve_guard import OPEN, Scope
from intaglio.runtimes.serve_hub import Hub, facts_of
from intaglio.runtimes.serve_model import Model
from intaglio.runtimes.serve_openai import error_body
from intaglio.runtimes.serve_room import Protocol, Room

WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300)  # seconds of a request, of a stage, in the queue
STEP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds of a denoising step
# Counted when it happens: name -> (what it is, labels, buckets of a histogram).
COUNTED: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "intaglio_http_requests_total": ("answers", ("protocol", "status"), ()),
    "intaglio_request_duration_seconds": ("arrival to the last byte", ("protocol", "outcome"), WHOLE),
    "intaglio_generations_total": ("requests for pictures that ended", ("model", "outcome"), ()),
    "intaglio_queue_seconds": ("a picture's wait, arrival to a worker", ("model",), WHOLE),
    "intaglio_stage_seconds": ("a picture's time in a stage", ("model", "stage"), WHOLE),
    "intaglio_step_seconds": ("a denoising step of a picture", ("model",), STEP),
    "intaglio_pictures_total": ("pictures made", ("model",), ()),
    "intaglio_steps_total": ("denoising steps done", ("model",), ()),
}
# Read when they are asked for: name -> (kind, what it is).
READ = {
    "intaglio_info": ("info", "this server"),
    "intaglio_model_info": ("info", "a served artifact: its build, its backend, its formats"),
    "intaglio_ready": ("gauge", "1: every artifact can serve, and new requests are taken"),
    "intaglio_model_loaded": ("gauge", "1: a worker has it in memory"),
    "intaglio_queue_depth": ("gauge", "pictures that wait"),
    "intaglio_queue_limit": ("gauge", "pictures that may wait"),
    "intaglio_running": ("gauge", "pictures under way"),
    "intaglio_worker_memory_bytes": ("gauge", "of a worker: its own, and pages of mapped files"),
    "intaglio_worker_restarts_total": ("counter", "workers that died"),
    "intaglio_load_failures_total": ("counter", "starts of a worker that failed"),
    "intaglio_model_swaps_total": ("counter", "new builds that took over"),
    "intaglio_refusals_total": ("counter", "429: the queue was full, or the deadline could not be met"),
    "intaglio_deadline_misses_total": ("counter", "requests that were not ready in time"),
    "intaglio_denoiser_calls_total": ("counter", "calls of the denoiser"),
    "intaglio_denoiser_rows_total": ("counter", "rows of those calls; over calls: how well requests share them"),
    "intaglio_prompt_cache_hits_total": ("counter", "prompts whose embeddings were kept"),
    "intaglio_prompt_cache_misses_total": ("counter", "prompts that were encoded"),
    "intaglio_prompt_cache_bytes": ("gauge", "embeddings that are kept"),
    # Triton's, where they mean the same; they have no _total there either.
    "nv_inference_request_success": ("unknown", "as Triton's"),
    "nv_inference_request_failure": ("unknown", "as Triton's"),
    "nv_inference_pending_request_count": ("gauge", "as Triton's"),
}
SUFFIXES = {"counter": "_total", "info": "_info"}  # which the client library adds
REFUSALS = {"full": "queue_full", "hopeless": "deadline"}  # outcome of `Tally` -> reason
PULSE = {  # metric -> word of a worker's ``pulse``
    "intaglio_denoiser_calls_total": "calls",
    "intaglio_denoiser_rows_total": "rows",
    "intaglio_prompt_cache_hits_total": "cache_hits",
    "intaglio_prompt_cache_misses_total": "cache_misses",
}
# Triton's reasons: REJECTED is one that waited too long in the scheduler, BACKEND one that failed while it ran.
REASONS = {"cancelled": "CANCELED", "worker_lost": "BACKEND", "no_picture": "BACKEND", "internal_error": "BACKEND"}
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
VERSION = "1"  # every served artifact's, as for Triton's clients
CODES = {
    error.status: error.code
    for error in [kind for kind in vars(serve_errors).values() if isinstance(kind, type)][::-1]
    if issubclass(error, ServeError)
}
asked: ContextVar[Scope | None] = ContextVar("asked", default=None)  # the request this task answers


class Metrics(Collector):
    """One hub's, in a registry of their own.

    Args:
        hub: that is watched; this becomes one of its listeners.
        prefixes: of a protocol's paths -> its name.
    """

    def __init__(self, hub: Hub, prefixes: Mapping[str, str]) -> None:
        # Without the second series of every one, which says when it began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.hub, self.prefixes = hub, dict(sorted(prefixes.items(), key=lambda item: -len(item[0])))
        self.registry = CollectorRegistry()
        self.counted: dict[str, Any] = {name: self.made(name, *row) for name, row in COUNTED.items()}
        self.outcomes: Numbers[tuple[str, str]] = Numbers()  # (model, outcome) -> requests for pictures
        self.failures: Numbers[tuple[str, str]] = Numbers()  # (model, Triton's reason) -> the same
        self.listeners: dict[str, Callable[..., None]] = {
            "asked": self.asked, "accepted": self.accepted, "begun": self.begun, "step": self.step,
            "picture": self.picture, "ended": self.ended, "answered": self.answered,
        }  # fmt: skip
        for model in hub.models:  # so that a rate is known from the first one on
            self.counted["intaglio_pictures_total"].labels(model)
            self.counted["intaglio_steps_total"].labels(model)
            self.counted["intaglio_generations_total"].labels(model, "ok")
        self.registry.register(self)
        hub.listeners.append(self.heard)

    def made(self, name: str, about: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Counter | Histogram:
        """A row of COUNTED."""
        if buckets:
            return Histogram(name, about, labels, buckets=buckets, registry=self.registry)
        return Counter(name, about, labels, registry=self.registry)

    def heard(self, what: str, facts: Mapping[str, Any]) -> None:
        """Something happened; see `Hub.tell`."""
        if what in self.listeners:
            self.listeners[what](**facts)

    def asked(self, scope: Scope) -> None:
        """A request came; what its task does from here on is its own."""
        asked.set(scope)

    def accepted(self, ticket: Any) -> None:
        """A request for pictures was taken: the answer's outcome will be its."""
        scope = asked.get()
        if scope is not None:
            scope["state"].setdefault("taken", ticket)

    def begun(self, job: Any) -> None:
        """A picture left the queue."""
        waited = time.monotonic() - job.ticket.arrival
        self.counted["intaglio_queue_seconds"].labels(job.model.name).observe(waited)

    def step(self, ticket: Any, seconds: float) -> None:
        """A step was done."""
        self.counted["intaglio_steps_total"].labels(ticket.model.name).inc()
        self.counted["intaglio_step_seconds"].labels(ticket.model.name).observe(seconds)

    def picture(self, ticket: Any, picture: Any) -> None:
        """A picture was made."""
        name = ticket.model.name
        self.counted["intaglio_pictures_total"].labels(name).inc()
        for stage, seconds in picture.seconds.items():
            self.counted["intaglio_stage_seconds"].labels(name, stage).observe(seconds)

    def ended(self, ticket: Any, outcome: str) -> None:
        """A request for pictures ended."""
        name = ticket.model.name
        self.outcomes[name, outcome] += 1
        self.counted["intaglio_generations_total"].labels(name, outcome).inc()
        if outcome != "ok":
            begun = any(job.process is not None for job in ticket.jobs.values())
            late = "OTHER" if begun else "REJECTED"
            reason = late if outcome == "deadline_exceeded" else REASONS.get(outcome, "OTHER")
            self.failures[name, reason] += 1

    def answered(self, scope: Scope, status: int | None, seconds: float) -> None:
        """A request was answered, or its client went away before (``status`` is ``None``)."""
        protocol, ticket = self.protocol(scope["path"]), scope["state"].get("taken")
        self.counted["intaglio_http_requests_total"].labels(protocol, str(status or "none")).inc()
        outcome = "ok" if status is not None and status < 400 else CODES.get(status or 0, "other")
        if ticket is not None and ticket.error is not None:  # after a stream's 200, too
            outcome = ticket.error.code
        self.counted["intaglio_request_duration_seconds"].labels(protocol, outcome).observe(seconds)

    def protocol(self, path: str) -> str:
        """Whose path this is, by the longest prefix; ``other`` where it is nobody's."""
        if path in OPEN:
            return "health"
        found = (name for prefix, name in self.prefixes.items() if path == prefix or path.startswith(f"{prefix}/"))
        return next(found, "other")

    def collect(self) -> Iterator[Metric]:
        """What is read when it is asked for."""
        metrics = {n: Metric(n.removesuffix(SUFFIXES.get(k, "")), about, k) for n, (k, about) in READ.items()}
        hub = self.hub

        def put(name: str, value: float, **labels: str) -> None:
            metrics[name].add_sample(name, labels, value)

        put("intaglio_info", 1, version=__version__)
        put("intaglio_ready", hub.ready)
        put("intaglio_queue_limit", hub.queue.limit)
        for outcome, reason in REFUSALS.items():
            put("intaglio_refusals_total", hub.tally.outcomes.get(outcome, 0), reason=reason)
        for model in hub.models.values():
            self.of_model(model, put)
        yield from metrics.values()

    def of_model(self, model: Model, put: Callable[..., None]) -> None:
        """One artifact's."""
        name, facts = model.name, facts_of(model)
        words = {key: str(facts[key]) for key in ("family", "backend", "device", "digest")}
        formats = ",".join(f"{part}={form}" for part, form in facts["formats"].items())
        put("intaglio_model_info", 1, model=name, **words, formats=formats)
        put("intaglio_model_loaded", facts["loaded"], model=name)
        put("intaglio_queue_depth", sum(job.model is model for job in self.hub.queue), model=name)
        put("intaglio_running", model.running, model=name)
        put("intaglio_worker_restarts_total", model.restarts, model=name)
        put("intaglio_load_failures_total", model.failures, model=name)
        put("intaglio_model_swaps_total", model.swaps, model=name)
        workers = [*model.leaving, *([model.process] if model.process else [])]
        held = [found for worker in workers if worker.pid and (found := held_bytes(worker.pid)) is not None]
        for kind, index in (("private", 0), ("file", 1)):
            put("intaglio_worker_memory_bytes", sum(pair[index] for pair in held), model=name, kind=kind)
        for metric, word in PULSE.items():
            put(metric, model.past[word] + sum(worker.pulse.get(word, 0) for worker in workers), model=name)
        kept = sum(worker.pulse.get("cache_bytes", 0) for worker in workers)
        put("intaglio_prompt_cache_bytes", kept, model=name)
        put("intaglio_deadline_misses_total", self.outcomes[name, "deadline_exceeded"], model=name)
        own = {"model": name, "version": VERSION}
        put("nv_inference_request_success", self.outcomes[name, "ok"], **own)
        for reason in ("CANCELED", "REJECTED", "BACKEND", "OTHER"):
            put("nv_inference_request_failure", self.failures[name, reason], **own, reason=reason)
        tickets = [ticket for ticket in self.hub.tickets.values() if ticket.model is model]
        waiting = sum(all(job.process is None for job in ticket.jobs.values()) for ticket in tickets)
        put("nv_inference_pending_request_count", waiting, **own)


def prefixes_of(protocols: Mapping[str, Protocol]) -> dict[str, str]:
    """The paths of the server's protocols -> their names."""
    return {prefix: name for name, protocol in protocols.items() for prefix in protocol.prefixes}


def router(room: Room) -> APIRouter:
    """The route."""
    from intaglio.runtimes.serve_app import PROTOCOLS

    metrics = Metrics(room.hub, prefixes_of({name: resolve(path) for name, path in PROTOCOLS.items()}))
    routes = APIRouter(tags=["metrics"])

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read(request: Request) -> Response:
        """What the server did and does, for Prometheus."""
        if "application/openmetrics-text" in request.headers.get("accept", ""):
            data = openmetrics.generate_latest(metrics.registry)  # type: ignore[no-untyped-call]
            return Response(data, media_type=openmetrics.CONTENT_TYPE_LATEST)
        return Response(generate_latest(metrics.registry), media_type=PLAIN)

    routes.add_api_route("/metrics", read, methods=["HEAD"], include_in_schema=False)
    return routes


PROTOCOL = Protocol(prefixes=("/metrics",), router=router, error=error_body)
