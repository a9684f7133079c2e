"""Spans of ended requests: their times, their attributes by the conventions, their parent, and how they travel."""

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from deploy.frontend.service.observation import Observation
from deploy.observing.tracing import Tracer, phases
from tests.deploy.frontend.observations import SERVED, observation

BEGIN_NS = round(SERVED.started_unix_s * 1e9)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans(*observations: Observation) -> dict[str, Any]:
    """By name, of the last request that has one."""
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, "tiny")
    for each in observations:
        tracer.record(each)
    tracer.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_the_phases_of_a_request_follow_one_another() -> None:
    made = spans(observation())
    root = made.pop("text_completion tiny")
    assert root.kind is SpanKind.SERVER
    assert (root.start_time, root.end_time) == (BEGIN_NS, BEGIN_NS + 1_500_000_000)
    borders = {name: ((s.start_time - BEGIN_NS) / 1e9, (s.end_time - BEGIN_NS) / 1e9) for name, s in made.items()}
    assert borders == {"queue": (0.0, 0.1), "prefill": (0.1, 0.5), "decode": (0.5, 1.5)}
    assert all(span.parent.span_id == root.context.span_id for span in made.values())


def test_attributes_follow_the_conventions() -> None:
    root = spans(observation())["text_completion tiny"]
    assert dict(root.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "manta",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": "cmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 300,
        "gen_ai.usage.cache_read.input_tokens": 128,
        "gen_ai.usage.output_tokens": 11,
        "manta.outcome": "stop",
        "manta.preemptions": 1,
        "manta.priority": 2,
        "manta.miss.routed_tokens": 0,
        "manta.miss.evicted_tokens": 70,
        "manta.miss.cold_tokens": 100,
        "manta.miss.inside_block_tokens": 2,
    }
    assert root.resource.attributes["service.name"] == "manta"
    assert root.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(("outcome", "status"), [("timed_out", StatusCode.ERROR), ("overloaded", StatusCode.UNSET)])
def test_only_the_servers_faults_are_errors(outcome: str, status: StatusCode) -> None:
    refused = observation(outcome=outcome, message="no", ttft_s=None, queued_s=None)
    (root,) = spans(refused).values()
    assert root.status.status_code is status
    assert root.attributes["error.type"] == outcome


def test_phases_with_unknown_borders_are_left_out() -> None:
    assert [name for name, _, _ in phases(observation(queued_s=None, outcome="abort"))] == ["decode"]
    assert [*phases(observation(queued_s=None, ttft_s=None))] == []
    late = [*phases(observation(queued_s=0.9))]  # the last of several prompts waited longer than the first was computed
    assert late == [("queue", 0.0, 0.5), ("prefill", 0.5, 0.5), ("decode", 0.5, 1.5)]


def test_a_callers_trace_goes_on_and_an_invalid_one_does_not() -> None:
    root = spans(observation(traceparent=f"00-{TRACE}-{PARENT}-01"))["text_completion tiny"]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    for header in (None, "", "nonsense", f"00-{'0' * 32}-{PARENT}-01"):
        assert spans(observation(traceparent=header))["text_completion tiny"].parent is None


def test_a_trace_that_the_caller_does_not_sample_is_not_sent() -> None:
    assert spans(observation(traceparent=f"00-{TRACE}-{PARENT}-00")) == {}


class Collector(http.server.ThreadingHTTPServer):
    """An OTLP receiver: keeps what was posted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.posts: list[tuple[str, bytes]] = []


class _Take(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("suffix", "path"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/otlp/spans", "/otlp/spans")])
def test_spans_arrive_at_a_collector(collector: Collector, suffix: str, path: str) -> None:
    tracer = Tracer.to_collector(f"http://127.0.0.1:{collector.server_port}{suffix}", "tiny")
    trace_id = tracer.record(observation())
    tracer.close()
    ((posted, body),) = collector.posts
    assert posted == path
    request = ExportTraceServiceRequest.FromString(body)
    received = [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in received} == {"text_completion tiny", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in received} == {trace_id}
