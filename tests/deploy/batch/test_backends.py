"""Who answers: the service on the checkpoint that ships with Manta, the endpoint over it, and what each says when it cannot."""

import asyncio
import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import EngineConfig
from cluster.engine import EngineError, OnDeltas, OnFailure
from deploy.batch.backends.backend import Backend
from deploy.batch.backends.clusters import open_cluster
from deploy.batch.backends.endpoint import EndpointBackend, open_endpoint
from deploy.batch.backends.own import ServiceBackend, open_backend, open_service
from deploy.batch.job import BatchJob
from deploy.batch.limits import Limits
from deploy.batch.lines import Line, parse
from deploy.batch.progress import JobTally
from deploy.config.load import EMBEDDED_MODEL, Config, ConfigError, load_config
from deploy.doors.access import ApiKeys, account
from deploy.doors.http.app import create_app
from deploy.frontend.errors import RETRY_AFTER_S, Fault, RequestError
from scheduler.server.stats import ClusterStatus
from tests.deploy.batch.jobs import CHAT, as_lines, custom_ids, entry, journal_at, read
from tests.deploy.frontend.fake_engine import FakeEngine
from tests.shared.servers import QuietHandler, answering

ENTRIES = [
    *(entry(f"def f{number}(x):", temperature=0, logprobs=2) for number in range(8)),
    *(entry(f"chat{number}", CHAT, temperature=0, n=2, model="tiny") for number in range(8)),
    entry("two prompts", prompt=["def a(", "def b("], temperature=0, echo=True),
    entry("other model", model="gpt"),
    entry("bad field", temprature=1),
    *(entry(f"unknown {number}", temperature=0, reticulation="splines") for number in range(2)),
    entry("bad value", CHAT, temperature=-1),
    entry("too long", prompt="def " * 5000),
    entry("json", CHAT, temperature=0, max_tokens=40, response_format={"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"],
        "additionalProperties": False}}}),
]  # fmt: skip
FAILED = {"other model": 404, "bad field": 400, "bad value": 400, "too long": 400}


def configured(**engine: Any) -> Config:
    return load_config(engine={"local": True, "kv_memory": "64MiB"} | engine, environ={})


async def run(backend: Backend, output: Path, content: bytes, limits: Limits | None = None) -> None:
    with closing(journal_at(output)) as journal:
        job = BatchJob(io.BytesIO(content), journal, limits or Limits(), JobTally(0))
        if job.catch_up():
            await job.run(backend)


def without_names(body: dict[str, Any]) -> dict[str, Any]:
    """What is said, less what differs between any two answers."""
    usage = {key: value for key, value in body.get("usage", {}).items() if key != "prompt_tokens_details"}
    return {key: value for key, value in body.items() if key not in ("id", "created")} | {"usage": usage}


def test_the_service_and_the_endpoint_answer_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_output, endpoint_output = tmp_path / "own.jsonl", tmp_path / "endpoint.jsonl"
    config = configured()

    async def scenario() -> None:
        async with open_service(cluster, config) as service:
            await run(ServiceBackend(service, config.serve), own_output, as_lines(ENTRIES))
            transport = httpx.ASGITransport(create_app(service, config.serve, ApiKeys()))
            async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
                await run(EndpointBackend(client), endpoint_output, as_lines(ENTRIES))

    with open_cluster(config.engine, None, lambda _: None) as cluster:
        asyncio.run(scenario())
    answers = {each["custom_id"]: each["response"] for each in read(own_output)}
    assert custom_ids(read(own_output)) == custom_ids(read(endpoint_output)) == custom_ids(ENTRIES)
    assert {name: answer["status_code"] for name, answer in answers.items() if answer["status_code"] != 200} == FAILED
    for each in read(endpoint_output):
        mine = answers[each["custom_id"]]
        assert each["response"]["status_code"] == mine["status_code"]
        assert without_names(each["response"]["body"]) == without_names(mine["body"])
    assert answers["bad field"]["body"]["error"]["param"] == "temprature"
    assert answers["json"]["body"]["choices"][0]["message"]["content"].replace(" ", "") == '{"a":7}'
    warned = [record.getMessage() for record in caplog.records if "reticulation" in record.getMessage()]
    assert len(warned) == 2, "each job says it once, whoever answers"
    for name in ("def f0(x):", "two prompts"):
        assert answers[name]["body"]["usage"]["completion_tokens"] > 0


# ---- groups of the job's own ----


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """In the place of the job's engine."""
    fake = FakeEngine([50, 51, 52], block_size=256)
    monkeypatch.setattr("cluster.local.engine.start_local", fake.start)
    return fake


def test_groups_of_the_jobs_own_end_with_it(tmp_path: Path, engine: FakeEngine) -> None:
    config = configured()

    async def scenario() -> None:
        async with open_backend(cluster, config) as backend:
            await run(backend, tmp_path / "out.jsonl", as_lines([entry("a", timeout=50.0), entry("b")]))

    with open_cluster(config.engine, None, lambda _: None) as cluster:
        asyncio.run(scenario())
    assert custom_ids(read(tmp_path / "out.jsonl")) == {"a": 1, "b": 1}
    assert engine.closed


def test_a_line_says_on_whose_account_and_by_when(tmp_path: Path, engine: FakeEngine) -> None:
    """As at the endpoint, by `user` and `timeout`; a line that says nothing has the time that it needs."""
    config = configured()
    entries = [entry("a", user="ann", timeout=1e6, priority=-3), entry("b", CHAT, user="bob", timeout=2e6), entry("c")]

    async def scenario() -> None:
        async with open_backend(cluster, config) as backend:
            await run(backend, tmp_path / "out.jsonl", as_lines(entries), Limits(requests=1))
            asked = [(request.tenant, request.deadline_s, request.priority) for request in engine.requests]
            assert asked == [(account("ann"), 1e6, -3), (account("bob"), 2e6, 0), ("", None, 0)]

    with open_cluster(config.engine, None, lambda _: None) as cluster:
        asyncio.run(scenario())


def test_a_line_that_is_not_done_in_time_has_a_504(tmp_path: Path, engine: FakeEngine) -> None:
    engine.hold_after = 0
    config = configured()

    async def scenario() -> None:
        async with open_backend(cluster, config) as backend:
            await run(backend, tmp_path / "out.jsonl", as_lines([entry("a", timeout=0.01)]))

    with open_cluster(config.engine, None, lambda _: None) as cluster:
        asyncio.run(scenario())
    [line] = read(tmp_path / "out.jsonl")
    error = line["response"]["body"]["error"]
    assert (line["response"]["status_code"], error["code"]) == (504, "deadline_exceeded")


def test_groups_that_do_not_start_are_the_callers_error(engine: FakeEngine) -> None:
    engine.fail_start = EngineError("4 ranks were asked for and there is room for 2")
    with pytest.raises(EngineError, match="room for 2"), open_cluster(configured().engine, None, lambda _: None):
        pass


def test_an_engine_that_is_lost_ends_the_job_at_once_with_its_reason(tmp_path: Path, engine: FakeEngine) -> None:
    engine.lose_after = 40
    config = configured()
    entries = [entry(f"r{number}", ignore_eos=True) for number in range(200)]

    async def scenario() -> None:
        async with open_backend(cluster, config) as backend:
            await run(backend, tmp_path / "out.jsonl", as_lines(entries), Limits(requests=4, retries=1_000_000))

    with (
        open_cluster(config.engine, None, lambda _: None) as cluster,
        pytest.raises(EngineError, match="the fake engine burnt down"),
    ):
        asyncio.run(scenario())
    done = read(tmp_path / "out.jsonl")
    assert 0 < len(done) < 200
    assert all(each["response"]["status_code"] == 200 for each in done)
    assert engine.starts == 1


class NeverReady:
    """A cluster that stays as it is."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Any:  # noqa: ARG002
        raise EngineError("nobody is there")

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        return ClusterStatus(phase=self.phase, model=str(EMBEDDED_MODEL), progress=("the last group died",))


@pytest.mark.parametrize(
    ("phase", "reason"), [("starting", "no group could be reached within 0.2 s"), ("stopped", "the last group died")]
)
def test_a_cluster_that_is_never_ready_is_not_waited_for_for_ever(phase: str, reason: str) -> None:
    async def scenario() -> None:
        async with open_service(NeverReady(phase), configured(start_timeout_s=0.2)):
            pass

    with pytest.raises(EngineError, match=reason):
        asyncio.run(scenario())


# ---- an endpoint ----

REQUEST = parse(Line(1, as_lines([entry("a")]).strip(), 0), 1 << 20)


def ask(respond: Callable[[httpx.Request], httpx.Response]) -> Any:
    async def scenario() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://manta") as client:
            return await EndpointBackend(client).answer(REQUEST)

    return asyncio.run(scenario())


def error(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "because", "type": "t"}}, headers=headers)


def test_a_body_goes_there_and_comes_back_as_it_is() -> None:
    asked: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=b'{"usage": {"completion_tokens": 7}, "x": [1]}')

    answer = ask(respond)
    assert (answer.status, answer.body, answer.output_tokens) == (200, b'{"usage": {"completion_tokens": 7}, "x": [1]}', 7)
    assert (asked[0].url.path, asked[0].content) == (REQUEST.url, REQUEST.body)
    assert asked[0].headers["x-request-id"] == REQUEST.id


@pytest.mark.parametrize("status", [400, 404, 422, 500, 504])
def test_refusals_are_answers(status: int) -> None:
    answer = ask(lambda _: error(status))
    assert (answer.status, b"because" in answer.body) == (status, True)


@pytest.mark.parametrize(
    ("response", "fault", "retry_after_s"),
    [
        (error(429, **{"retry-after": "3"}), Fault.OVERLOADED, 3.0),
        (error(429, **{"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}), Fault.OVERLOADED, RETRY_AFTER_S),
        (error(503), Fault.UNAVAILABLE, RETRY_AFTER_S),
        (httpx.Response(502, text="<html>bad gateway</html>"), Fault.UNAVAILABLE, RETRY_AFTER_S),
    ],
)
def test_what_will_pass_is_to_be_tried_again(response: httpx.Response, fault: Fault, retry_after_s: float) -> None:
    with pytest.raises(RequestError) as caught:
        ask(lambda _: response)
    assert (caught.value.fault, caught.value.retry_after_s) == (fault, retry_after_s)


def test_a_server_that_cannot_be_reached_may_come_back() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with pytest.raises(RequestError, match=r"http://manta cannot be reached: connection refused") as caught:
        ask(refuse)
    assert caught.value.fault is Fault.UNAVAILABLE


def test_a_connection_that_is_cut_in_the_midst_of_an_answer_is_asked_again(tmp_path: Path) -> None:
    """Nobody has seen anything of it: the line's result is that of the whole answer."""
    heard: list[int] = []

    class Torn(QuietHandler):
        def do_POST(self) -> None:
            body = b'{"usage": {"completion_tokens": 7}}'
            heard.append(len(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if len(heard) > 2 else body[:10])

    async def scenario(port: int) -> None:
        async with open_endpoint(f"http://127.0.0.1:{port}", None, 1) as backend:
            await run(backend, tmp_path / "out.jsonl", as_lines([entry("a")]), Limits(retries=2))

    with answering(Torn) as port:
        asyncio.run(scenario(port))
    [line] = read(tmp_path / "out.jsonl")
    assert (len(heard), line["response"]["body"]) == (3, {"usage": {"completion_tokens": 7}})


def test_a_key_that_is_refused_is_the_users_to_change() -> None:
    with pytest.raises(ConfigError, match=r"refuses the API key \(because\): give one by --api-key-file"):
        ask(lambda _: error(401))


def test_what_is_not_json_is_told_as_an_error() -> None:
    answer = ask(lambda _: httpx.Response(200, text="<html>hello</html>"))
    assert b"not a JSON object: '<html>hello" in answer.body


@pytest.mark.parametrize("url", ["http://host:8000", "http://host:8000/", "http://host:8000/v1", "http://host:8000/v1/"])
def test_an_address_is_taken_with_and_without_its_path(url: str) -> None:
    async def scenario() -> None:
        async with open_endpoint(url, "secret", 7) as backend:
            client = backend._client
            assert str(client.build_request("POST", REQUEST.url).url) == "http://host:8000/v1/completions"
            assert client.headers["authorization"] == "Bearer secret"

    asyncio.run(scenario())


def test_the_engine_is_started_as_it_was_asked_for(engine: FakeEngine) -> None:
    with open_cluster(configured(groups=3).engine, None, lambda _: None):
        assert isinstance(engine.config, EngineConfig)
        assert engine.config.groups == 3
