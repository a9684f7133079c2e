"""OpenTelemetry spans of requests: one for the request, below it queue, prefill and decode; sent by OTLP over HTTP.

Imports opentelemetry, so is itself imported only where traces are asked for (`deploy.observing.observer`).
"""

from collections.abc import Iterator
from urllib.parse import urlsplit

import requests
from msgspec.structs import asdict
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from deploy.config.client import on_this_machine
from deploy.frontend.service.observation import Observation
from deploy.observing.logs import OUR_FAULTS
from deploy.observing.tally import SERVED

OPERATION = "text_completion"
TRACES_PATH = "/v1/traces"


class Tracer:
    """Makes the spans of a request when it has ended, from its `Observation`; sends them from a thread of its own.

    Spans that the collector does not take in time are dropped, with a warning in the log; requests never wait for it.
    """

    def __init__(self, exporter: SpanExporter, model: str) -> None:
        self._model = model
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "manta"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("manta")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, endpoint: str, model: str) -> "Tracer":
        """endpoint: "http://collector:4318", or a whole URL where the path is not the usual one."""
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH
        session = requests.Session()
        session.trust_env = not on_this_machine(urlsplit(endpoint).hostname or "")  # no proxy leads there
        return cls(OTLPSpanExporter(endpoint=url, session=session), model)

    def record(self, observation: Observation) -> str:
        """Returns the id of the trace that the spans belong to: the caller's, if it gave a valid `traceparent`."""
        caller = self._propagator.extract({"traceparent": observation.traceparent or ""})
        begin_ns = _nanoseconds(observation.started_unix_s)
        span = self._tracer.start_span(
            f"{OPERATION} {self._model}", caller, SpanKind.SERVER, self._attributes(observation), start_time=begin_ns
        )
        if observation.outcome in OUR_FAULTS:
            span.set_status(Status(StatusCode.ERROR, observation.message))
        context = set_span_in_context(span)
        for name, first_s, last_s in phases(observation):
            child = self._tracer.start_span(name, context, start_time=begin_ns + _nanoseconds(first_s))
            child.end(begin_ns + _nanoseconds(last_s))
        span.end(begin_ns + _nanoseconds(observation.e2e_s))
        trace_id: str = format_trace_id(span.get_span_context().trace_id)
        return trace_id

    def close(self) -> None:
        """Sends what waits; takes seconds if the collector does not answer."""
        self._provider.shutdown()

    def _attributes(self, observation: Observation) -> dict[str, AttributeValue]:
        """By the semantic conventions for generative AI, and our own beside them."""
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": "manta",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": observation.request_id,
            "gen_ai.usage.input_tokens": observation.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": observation.cached_tokens,
            "gen_ai.usage.output_tokens": observation.output_tokens,
            "manta.outcome": observation.outcome,
            "manta.preemptions": observation.preemptions,
            "manta.priority": observation.priority,
            **{f"manta.miss.{reason}_tokens": tokens for reason, tokens in asdict(observation.misses).items()},
        }
        if observation.outcome in SERVED:
            attributes["gen_ai.response.finish_reasons"] = [observation.outcome]
        elif observation.message:
            attributes["error.type"] = observation.outcome
        return attributes


def phases(observation: Observation) -> Iterator[tuple[str, float, float]]:
    """(name, begin, end) in seconds since the request's arrival. A phase with a border that is not known is left out.

    Of several prompts the first token counts, and the longest wait: so the queue is cut off there.
    """
    queued_s, ttft_s = observation.queued_s, observation.ttft_s
    if queued_s is not None and ttft_s is not None:
        queued_s = min(queued_s, ttft_s)
        yield "queue", 0.0, queued_s
        yield "prefill", queued_s, ttft_s
    if ttft_s is not None:
        yield "decode", ttft_s, observation.e2e_s


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
