"""The endpoint as a user starts it, `manta serve` on a Ray cluster of its own: what clients see while its processes die.

One start for all tests, which run in order; the last one ends it with Ctrl-C. What must happen in mid-stream happens while the
workers are stopped: however slow this machine is, no stream ends before it.
"""

import contextlib
import os
import runpy
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import anthropic
import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.config.load import PROXY_PORTS
from deploy.proto import manta_pb2 as pb
from deploy.proto import manta_pb2_grpc
from tests.shared.ports import free_ports
from tests.shared.processes import (
    ENGINE,
    INGRESS,
    SCHEDULER,
    WORKER,
    alive,
    all_named,
    command_line,
    descendants,
    running_by,
    stopped_in_the_midst,
    wait_gone,
)

pytestmark = pytest.mark.ray

PATIENCE_S = 180.0
SELDOM_S = 0.5
"""How often to ask for what takes long: for each answer several processes compute."""
PROMPTS = ["def fibonacci(n):", "class Stack:", "import os", "for line in"]
LONG, ENDLESS = 150, 1900
resume_stream = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "resume_stream.py"))["stream"]

GATED = """
import sys, time
from pathlib import Path

class Gate:
    @staticmethod
    def find_spec(name, path=None, target=None):
        while name == "workers.process.life" and not Path({gate!r}).exists():
            time.sleep(0.05)

sys.meta_path.insert(0, Gate)
"""
"""A `sitecustomize` with which no rank goes on with its start before a file is there."""

T = TypeVar("T")


def until(what: str, true: Callable[[], T | None], clue: Callable[[], object] = str, every_s: float = 0.05) -> T:
    """What it says as soon as that is true. clue: asked if that takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := true()):
        assert time.monotonic() < deadline, f"{what}: {clue()}"
        time.sleep(every_s)
    return answer


class Endpoint:
    """The process, and its clients."""

    def __init__(self, folder: Path, options: Sequence[str] = ("--groups", "2", "--replicas", "2")) -> None:
        self.log, self.gate = folder / "serve.log", folder / "gate"
        (folder / "sitecustomize.py").write_text(GATED.format(gate=str(self.gate)))
        port, grpc_port, *own_ports = free_ports(2 + len(PROXY_PORTS))
        self.port = port
        command = [sys.executable, "-m", "manta", "serve", *options, "--kv-memory", "32MiB"]
        command += ["--hung-after-s", "600"]  # tests stop ranks for as long as they like
        command += ["--dtype", "float32", "--port", str(port), "--grpc-port", str(grpc_port)]
        variables = [variable for variable, _ in PROXY_PORTS.values()]  # fixed ports: another endpoint may have them
        self.environment = os.environ | {name: str(free) for name, free in zip(variables, own_ports, strict=True)}
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
        self.grpc = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        self.address = f"http://127.0.0.1:{port}, gRPC on 127.0.0.1:{grpc_port}"

    @property
    def said(self) -> str:
        return self.log.read_text()

    def status(self) -> dict[str, Any]:
        """Asks again if the replica that was asked is the one that has just been killed."""

        def told() -> dict[str, Any] | None:
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
                answer = self.http.get("/status.json?history=0")
                return answer.json() if answer.status_code == 200 else None
            return None

        return until("no replica tells the status", told)

    def now(self, column: str) -> Any:
        status = self.status()
        return status["now"][status["columns"].index(column)]

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):  # at first nobody listens
            return self.http.get("/ready").status_code == 200
        return False

    def complete(self, prompt: str = PROMPTS[0], max_tokens: int = 8) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": max_tokens})

    def refusal(self) -> httpx.Response | None:
        """The answer to a request, if it is 503. At first nobody listens, then Serve knows of no application."""
        try:
            answer = self.complete()
        except httpx.TransportError:
            return None
        assert answer.status_code == 503, answer.text
        return answer

    def processes(self, name: str, count: int) -> list[int]:
        return all_named(name, count, self.process.pid, PATIENCE_S)

    def haproxy(self) -> tuple[int, Path]:
        """The one that Serve knows, and its configuration."""

        def told() -> tuple[int, Path] | None:
            lines = descendants(self.process.pid).items()
            return next(((pid, Path(line.split()[3])) for pid, line in lines if "/bin/haproxy -db -f " in line), None)

        return until("there is no HAProxy", told)

    def second(self) -> int | None:
        """The one beside it, once it listens."""
        folder = self.haproxy()[1].parent
        found = [pid for pid in running_by(folder) if f" -f {folder}/second.cfg" in command_line(pid)]
        return found[0] if found and (folder / "second.sock").exists() else None

    def newcomers(self) -> list[int]:
        """Status codes of requests over connections of their own. Errors: httpx.ConnectError for one that is refused."""
        return [httpx.get(f"{self.http.base_url}/health", timeout=PATIENCE_S).status_code for _ in range(20)]

    def is_idle(self) -> bool:
        status = self.status()
        return [group["held"] + group["running"] for group in status["groups"]] == [0, 0]

    def running(self) -> int:
        """Sequences that hold a lease, at this moment; -1 if no replica or no scheduler tells."""
        try:
            lines = self.http.get("/metrics").text.splitlines()
        except (httpx.RemoteProtocolError, httpx.ReadError):
            return -1
        told = [float(line.split()[-1]) for line in lines if line.startswith("manta_sequences_running{")]
        return int(sum(told)) if told else -1

    def stopped_once_begun(self, begin: Callable[[], list[T]]) -> contextlib.AbstractContextManager[list[T]]:
        """Requests that have all begun and of which none has ended: the workers are stopped until the block is left."""

        def begin_again() -> list[T]:
            until("those before have not ended", lambda: self.running() == 0)
            return begin()

        return stopped_in_the_midst(self.processes(WORKER, 2), begin_again, lambda begun: self.running() == len(begun))

    @contextlib.contextmanager
    def streams(
        self, prompts: Sequence[str], max_tokens: int, kind: type["Stream"] | None = None
    ) -> Iterator[list["Stream"]]:
        """All under way until the block is left."""

        def begin() -> list["Stream"]:
            streams = [(kind or Stream)(self, prompt, max_tokens) for prompt in prompts]
            until("not all have begun", lambda: all(stream.text for stream in streams))
            return streams

        with self.stopped_once_begun(begin) as begun:
            yield begun

    def is_whole(self) -> bool:
        """Both groups are up, both replicas reach the scheduler."""
        status = self.status()
        return [group["state"] for group in status["groups"]] == ["up", "up"] and status["front_ends"] == 2

    def was_taken_over(self) -> bool:
        return any("took over" in words for words in self.status()["progress"])

    def await_whole(self, what: str) -> None:
        until(what, self.is_whole, self.status, SELDOM_S)

    def close(self) -> None:
        self.grpc.close()
        self.openai.close()
        self.http.close()
        below = descendants(self.process.pid)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE_S)
            self.process.kill()
        for pid in wait_gone(below, patience_s=5.0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Stream(threading.Thread):
    """A streamed completion, read in a thread of its own."""

    def __init__(self, endpoint: Endpoint, prompt: str, max_tokens: int = LONG) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.reason: str | None = None
        self.error: Exception | None = None
        self._parts = self._opened(endpoint, {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0})
        self.start()

    def _opened(self, endpoint: Endpoint, body: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
        """(text, finish reason) of each event."""
        events = endpoint.openai.completions.create(**body, stream=True, extra_body={"ignore_eos": True})
        return ((event.choices[0].text, event.choices[0].finish_reason) for event in events)

    def run(self) -> None:
        try:
            for text, reason in self._parts:
                self.text += text
                self.reason = reason
        except (openai.APIError, httpx.HTTPError, RuntimeError) as error:
            self.error = error

    def ended(self) -> "Stream":
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the stream did not end"
        assert (self.reason is None) == (self.error is not None), "a stream ends with a finish reason, or else with an error"
        return self


class ResumedStream(Stream):
    """One whose client goes on where it was when it is cut."""

    def _opened(self, endpoint: Endpoint, body: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
        events = resume_stream(endpoint.http, "/v1/completions", body | {"ignore_eos": True})
        return ((event["choices"][0]["text"], event["choices"][0]["finish_reason"]) for event in events)


def begin(stub: manta_pb2_grpc.MantaStub, names: list[str]) -> list[Any]:
    """Calls that have all answered once: on a busy host the first would have ended before the last had begun, one by one."""
    sampling, prompt = pb.SamplingParams(max_tokens=ENDLESS, ignore_eos=True), pb.Prompt(text="x")
    requests = [pb.GenerateRequest(request_id=name, prompt=prompt, sampling=sampling) for name in names]
    calls = [stub.Generate(request, timeout=PATIENCE_S) for request in requests]
    for call in calls:
        next(call)
    return calls


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with contextlib.closing(Endpoint(tmp_path_factory.mktemp("serve"))) as opened:
        yield opened


def settled(endpoint: Endpoint) -> Endpoint:
    endpoint.gate.touch()  # whichever test comes first
    until("it is not ready", endpoint.ready, endpoint.status, SELDOM_S)
    endpoint.await_whole("it is not whole")
    until("it is not idle", endpoint.is_idle, endpoint.status, SELDOM_S)
    return endpoint


@pytest.fixture
def whole(endpoint: Endpoint) -> Endpoint:
    """As it is when nothing has happened to it, or when all of that is over."""
    return settled(endpoint)


@pytest.fixture(scope="module")
def expected(endpoint: Endpoint) -> list[str]:
    """What the endpoint says while nothing happens to it."""
    streams = [Stream(settled(endpoint), prompt).ended() for prompt in PROMPTS]
    assert [(stream.error, stream.reason) for stream in streams] == [(None, "length")] * len(PROMPTS)
    return [stream.text for stream in streams]


def test_until_it_is_ready_clients_are_told_to_come_again(endpoint: Endpoint) -> None:
    refused = until("requests are not refused", lambda: endpoint.refusal())
    assert refused.headers["Retry-After"] == "1"
    assert "is ready at" not in endpoint.said
    endpoint.gate.touch()
    until("it does not say that it is ready", lambda: f"tiny is ready at {endpoint.address}" in endpoint.said, every_s=SELDOM_S)
    assert endpoint.newcomers() == [200] * 20, "whichever HAProxy they meet"
    assert endpoint.complete().status_code == 200
    assert endpoint.http.get("/health").json() == {"status": "ok"}


def test_haproxys_files_are_for_this_account_alone(whole: Endpoint) -> None:
    file = whole.haproxy()[1]
    for folder in (file.parent, file.parents[1]):  # of the node, and of the endpoint
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((file.parent / "admin.sock").stat().st_mode) == 0o600
    assert "bind *" not in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["its own", "its manager's"])
def test_newcomers_meet_no_gap_when_haproxy_dies(whose: str, whole: Endpoint) -> None:
    pid, _ = whole.haproxy()
    until("the second one does not listen", lambda: whole.second() is not None)
    os.kill(pid if whose == "its own" else whole.processes("ray::HAProxyManager", 1)[0], signal.SIGKILL)
    until("it lives on", lambda: not alive([pid]))
    over = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(lambda: [whole.newcomers() for _ in iter(over.is_set, True)])
        try:
            until("Serve has not started another", lambda: whole.haproxy()[0] != pid)
            over.wait(5.0)  # another manager hears of the applications only after it has started that
        finally:
            over.set()
        assert all(answers == [200] * 20 for answers in asking.result())
    assert whole.newcomers() == [200] * 20
    whole.http.close()  # what was open may have been cut
    whole.http = httpx.Client(base_url=whole.http.base_url, timeout=PATIENCE_S)


def test_a_second_endpoint_on_its_port_is_refused_at_once(whole: Endpoint) -> None:
    command = [sys.executable, "-m", "manta", "serve", "--port", str(whole.port)]
    second = subprocess.run(command, env=whole.environment, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"port {whole.port} on 127.0.0.1, for HTTP, cannot be had" in second.stderr
    assert "starting" not in second.stderr


def test_it_answers_over_http_whole_and_streamed(whole: Endpoint, expected: list[str]) -> None:
    answer = whole.openai.completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=LONG, temperature=0, extra_body={"ignore_eos": True}
    )
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.completion_tokens == LONG * len(PROMPTS)
    assert [model.id for model in whole.openai.models.list()] == ["tiny"]
    for path in ("/health", "//v1/models/", "/ready"):
        assert whole.http.head(f"{whole.http.base_url}{path}").status_code == 200
    assert whole.http.get("/version", headers={"X-Request-Id": "mine"}).headers.get_list("X-Request-Id") == ["mine"]
    assert len(whole.http.get("/version").headers.get_list("X-Request-Id")) == 1
    until("nobody was counted", lambda: "manta_" in whole.http.get("/metrics").text)


def test_it_answers_in_anthropics_words(whole: Endpoint) -> None:
    """Event by event through HAProxy; Serve puts one header with the request's id on the answer, Anthropic's is ours."""
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 8}
    chat = whole.openai.chat.completions.create(**asked, temperature=0).choices[0].message.content
    with anthropic.Anthropic(base_url=str(whole.http.base_url), api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        greedy: Any = asked | {"extra_body": {"temperature": 0}}
        answer = client.messages.create(**greedy)
        with client.messages.stream(**greedy) as stream:
            said = "".join(stream.text_stream)
        assert [block.text for block in answer.content if block.type == "text"] == [chat] == [said]
        assert answer.id == f"msg_{answer._request_id}"
        with pytest.raises(anthropic.NotFoundError) as refused:
            client.messages.create(**asked | {"model": "other"})
        assert refused.value.type == "not_found_error"


def test_it_answers_over_grpc(whole: Endpoint, expected: list[str]) -> None:
    stub = manta_pb2_grpc.MantaStub(whole.grpc)
    request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPTS[0]), sampling=pb.SamplingParams(
        temperature=0, max_tokens=LONG, ignore_eos=True
    ))  # fmt: skip
    responses = list(stub.Generate(request, timeout=PATIENCE_S))
    assert "".join(choice.text for response in responses for choice in response.choices) == expected[0]
    health = health_pb2_grpc.HealthStub(whole.grpc).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert health.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.slow
def test_a_conversation_goes_on_whichever_replica_is_asked_and_outlives_them(whole: Endpoint) -> None:
    def respond(previous: str | None) -> str:
        """Over a connection of its own."""
        body = {"input": "And now?", "previous_response_id": previous, "max_output_tokens": 4}
        answer = httpx.post(f"{whole.http.base_url}/v1/responses", json=body, timeout=PATIENCE_S)
        assert (answer.status_code, answer.json().get("store")) == (200, True), answer.text
        return str(answer.json()["id"])

    last = None
    for _ in range(4):
        last = respond(last)
    for victim in whole.processes(INGRESS, 2):
        os.kill(victim, signal.SIGKILL)
        until("nobody is missed", lambda killed=victim: killed not in whole.processes(INGRESS, 2))  # type: ignore[misc]
        whole.await_whole("there is no other replica")
    for _ in range(4):
        last = respond(last)
    listed = whole.http.get(f"/v1/responses/{last}/input_items", params={"limit": 100})
    assert [item["role"] for item in listed.json()["data"]] == ["user", "assistant"] * 7 + ["user"]


def test_a_request_is_aborted_by_its_id_whichever_replica_is_asked(whole: Endpoint) -> None:
    stub = manta_pb2_grpc.MantaStub(whole.grpc)
    names = [f"request-{i}" for i in range(4)]  # of two replicas: some are asked for what the other one has
    with whole.stopped_once_begun(lambda: begin(stub, names)) as calls:
        answers = [stub.Abort(pb.AbortRequest(request_id=name), timeout=PATIENCE_S) for name in names]
    assert [answer.aborted for answer in answers] == [1, 1, 1, 1]
    for call in calls:
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        assert ended.value.code() == grpc.StatusCode.CANCELLED
    until("blocks are still held", whole.is_idle)


@pytest.mark.slow
def test_a_replica_that_dies_takes_only_its_own_requests_along(whole: Endpoint) -> None:
    before = whole.processes(INGRESS, 2)
    with whole.streams([*PROMPTS, *PROMPTS], ENDLESS) as streams:
        os.kill(before[0], signal.SIGKILL)
        until("its requests still run", lambda: 0 <= whole.running() < len(streams))
        until("nobody was told", lambda: any(stream.error is not None for stream in streams))
    ends = [stream.ended() for stream in streams]
    assert {stream.reason for stream in ends if stream.error is None} == {"length"}, "those of the other replica go on"
    until("blocks are still held", whole.is_idle)
    whole.await_whole("there is no other replica")
    assert before[1] in whole.processes(INGRESS, 2)


def test_streams_with_ids_outlive_their_replica(whole: Endpoint, expected: list[str]) -> None:
    before = whole.processes(INGRESS, 2)
    with whole.streams([*PROMPTS, *PROMPTS], LONG, ResumedStream) as streams:
        os.kill(before[0], signal.SIGKILL)
        until("its requests still run", lambda: 0 <= whole.running() < len(streams))
    ends = [stream.ended() for stream in streams]
    assert [(stream.error, stream.text) for stream in ends] == [(None, text) for text in [*expected, *expected]]
    whole.await_whole("there is no other replica")


@pytest.mark.slow
def test_streams_outlive_a_worker(whole: Endpoint, expected: list[str]) -> None:
    before = whole.processes(WORKER, 2)
    with whole.streams(PROMPTS, LONG) as streams:
        os.kill(before[0], signal.SIGKILL)
    ends = [stream.ended() for stream in streams]
    assert [(stream.error, stream.text) for stream in ends] == [(None, text) for text in expected]
    whole.await_whole("the group did not come back")
    assert before[0] not in whole.processes(WORKER, 2)


def test_streams_outlive_the_engine_and_the_next_one_takes_over(whole: Endpoint, expected: list[str]) -> None:
    ranks, scheduler, (engine,) = whole.processes(WORKER, 2), whole.processes(SCHEDULER, 1), whole.processes(ENGINE, 1)
    life = whole.now("epoch")
    with whole.streams(PROMPTS, LONG) as streams:
        os.kill(engine, signal.SIGKILL)
        assert whole.ready(), "no engine is needed for requests"
    ends = [stream.ended() for stream in streams]
    assert [(stream.error, stream.text) for stream in ends] == [(None, text) for text in expected]
    assert whole.complete().status_code == 200
    until("there is no other engine", lambda: set(whole.processes(ENGINE, 1)) - {engine}, every_s=SELDOM_S)
    until("it has not taken over", whole.was_taken_over, whole.status, SELDOM_S)
    whole.await_whole("a group is missing")
    assert (whole.processes(WORKER, 2), whole.processes(SCHEDULER, 1)) == (ranks, scheduler)
    assert whole.now("epoch") == life
    assert [Stream(whole, prompt).ended().text for prompt in PROMPTS] == expected


@pytest.mark.slow
def test_streams_outlive_the_scheduler(whole: Endpoint, expected: list[str]) -> None:
    assert whole.now("epoch") == 0
    (victim,) = whole.processes(SCHEDULER, 1)
    with whole.streams(PROMPTS, LONG) as streams:
        os.kill(victim, signal.SIGKILL)
    ends = [stream.ended() for stream in streams]
    assert [(stream.error, stream.text) for stream in ends] == [(None, text) for text in expected]
    assert whole.complete().status_code == 200, "who comes now waits for the next one and its groups"
    until("it did not come back", whole.ready)
    whole.await_whole("a group or a replica did not come back")
    assert whole.now("epoch") == 1
    assert [Stream(whole, prompt).ended().text for prompt in PROMPTS] == expected


def test_ctrl_c_ends_everything(whole: Endpoint) -> None:
    below = descendants(whole.process.pid)
    assert len(below) > 8
    folder = whole.haproxy()[1].parent
    assert len(running_by(folder)) >= 2, "the second one is nobody's descendant"
    Stream(whole, PROMPTS[0], ENDLESS)
    os.killpg(whole.process.pid, signal.SIGINT)  # what a terminal does
    assert whole.process.wait(PATIENCE_S) == 130, whole.said
    assert "Traceback" not in whole.said
    assert not wait_gone(below), {pid: below[pid] for pid in alive(below)}
    until("the second HAProxy is left", lambda: not running_by(folder))


@pytest.mark.slow
def test_sigterm_ends_a_start_as_tidily(tmp_path: Path) -> None:
    with contextlib.closing(Endpoint(tmp_path)) as starting:
        until("it does not start", lambda: "starting Ray Serve" in starting.said, lambda: starting.said)
        below = descendants(starting.process.pid)
        starting.process.send_signal(signal.SIGTERM)
        assert starting.process.wait(PATIENCE_S) == 143, starting.said
        assert starting.said.splitlines()[-1] == "manta: terminated"
        assert "***" not in starting.said, "Ray's trace"
        assert not wait_gone(below), {pid: below[pid] for pid in alive(below)}
