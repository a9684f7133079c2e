"""A real endpoint: uvicorn in a thread over the checkpoint that ships with Manta, one engine for all tests of this folder."""

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import anthropic
import httpx
import openai
import pytest
import uvicorn

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineLost, OnDeltas, OnFailure
from deploy.config.load import EMBEDDED_MODEL, bound_openmp_spin
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.connections import bounded_protocol
from deploy.doors.http.app import create_app
from deploy.doors.openai.responses.store.storing import ResponseStore
from deploy.frontend.clusters import Cluster, LocalCluster
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.status.routes import status_routes
from scheduler.server.stats import ClusterStatus, EngineStats
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE
from tests.deploy.frontend.fake_engine import FakeEngine

MODEL = "tiny"
PATIENCE_S = 600.0
"""How long a test waits for what must come: 400 tokens take a minute where ten other programs share two cores."""
KV_MEMORY_BYTES = 64 << 20

T = TypeVar("T")


def until(condition: Callable[[], object]) -> None:
    """Waits for something that must come true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.002)


@functools.cache
def read_once(checkpoint: Path) -> ServedModel:
    return ServedModel.read(MODEL, checkpoint, None)


class Host:
    """An event loop in a thread of its own, and the services and servers that run on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._services: list[asyncio.Task[None]] = []
        self._servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def service(self, cluster: Cluster, checkpoint: Path = EMBEDDED_MODEL, model: ServedModel | None = None) -> Service:
        """A connected service that runs until the host closes."""

        async def start() -> Service:
            service = Service(model or read_once(checkpoint), cluster)
            self._services.append(asyncio.create_task(service.run()))
            return service

        service = self.run(start())
        until(lambda: service.connected)
        return service

    def serve(
        self, service: Service, config: ServeConfig | None = None, keys: ApiKeys | None = None,
        further: FurtherModels | None = None, store: ResponseStore | None = None,
    ) -> str:  # fmt: skip
        """The address of a server that runs until the host closes."""
        # Named as TCP, or asyncio leaves Nagle's algorithm on, and each event of a stream waits for the last one's receipt.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))

        async def start() -> None:
            limits = config or ServeConfig()
            pages = status_routes(service, further)
            app = create_app(service, limits, keys or ApiKeys(), pages=pages, further=further, store=store)
            bounded = bounded_protocol(limits)
            server = uvicorn.Server(uvicorn.Config(app, http=bounded, ws="none", log_level="warning"))
            self._servers.append((server, asyncio.create_task(server.serve(sockets=[listener]))))

        self.run(start())
        server = self._servers[-1][0]
        until(lambda: server.started)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def close(self) -> None:
        async def stop() -> None:
            for server, _ in self._servers:
                server.should_exit = True
            await asyncio.gather(*(running for _, running in self._servers))
            for service in self._services:
                service.cancel()
            await asyncio.gather(*self._services, return_exceptions=True)

        self.run(stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()


class ScriptedCluster:
    """A cluster on a `FakeEngine`: does what the test says, when it says so. lives: of the engine."""

    def __init__(self, engine: FakeEngine, lives: int = 1) -> None:
        self._engine = engine
        self._lives = lives

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
        if self._engine.starts == self._lives:
            raise EngineLost("the fake engine burnt down")
        return self._engine.start(EngineConfig(model=str(EMBEDDED_MODEL)), on_deltas, on_failure, lambda _: None)

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        return ClusterStatus(phase="ready", engine=self._engine.stats())


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    with contextlib.closing(Host()) as opened:
        yield opened


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that ships with Manta, with a chat template that says the same, and shows tools too. It does not think: a
    grammar would let it begin with a thought."""
    folder = tmp_path_factory.mktemp("endpoint") / MODEL
    folder.mkdir()
    for file in EMBEDDED_MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE.replace("<think></think>", "Briefly: "))
    return folder


@pytest.fixture(scope="session")
def service(host: Host, checkpoint: Path) -> Service:
    bound_openmp_spin()
    engine = EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=KV_MEMORY_BYTES, threads=1)
    return host.service(LocalCluster(engine), checkpoint)


@pytest.fixture(scope="session")
def address(host: Host, service: Service) -> str:
    """Of an open endpoint with the default limits."""
    return host.serve(service)


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as opened:
        yield opened


def messages_client(address: str, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def claude(address: str) -> Iterator[anthropic.Anthropic]:
    """A client of the same endpoint, that speaks Anthropic's Messages."""
    with messages_client(address) as opened:
        yield opened


Scripted = Callable[..., str]


@pytest.fixture
def scripted(host: Host) -> Iterator[Scripted]:
    """Serves an engine that does what the test says; in the end it lets go of what it holds."""
    engines: list[FakeEngine] = []

    def serve(engine: FakeEngine, checkpoint: Path = EMBEDDED_MODEL) -> str:
        engines.append(engine)
        return host.serve(host.service(ScriptedCluster(engine), checkpoint))

    yield serve
    for engine in engines:
        engine.released.set()


Stats = Callable[[], EngineStats]


@pytest.fixture
def stats(host: Host, service: Service) -> Stats:
    """The engine at this moment."""

    def now() -> EngineStats:
        engine = host.run(service.cluster.status()).engine
        assert engine is not None
        return engine

    return now
