"""A plain gRPC server over the checkpoint that ships with Manta, and a client of it, on one event loop: `runner`'s."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL, bound_openmp_spin
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.server import GrpcDoor, start_server
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from deploy.proto import manta_pb2_grpc
from tests.deploy.doors.grpc.calls import BLOCK_SIZE, consumed, until

Connect = Callable[..., tuple[Any, grpc.aio.Channel]]
"""Door, and the server's configuration if it matters."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as opened:
        yield opened


def new_service() -> Service:
    engine = EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=32 << 20, block_size=BLOCK_SIZE, threads=1)
    return Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), LocalCluster(engine))


@pytest.fixture(scope="module")
def service(runner: asyncio.Runner) -> Iterator[Service]:
    bound_openmp_spin()

    async def start() -> tuple[Service, asyncio.Task[None]]:
        started = new_service()
        running = asyncio.create_task(started.run())
        await until(lambda: started.connected)
        return started, running

    async def stop() -> None:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    started, running = runner.run(start())
    yield started
    runner.run(stop())


@pytest.fixture
def unconnected() -> Service:
    """Nobody runs it yet."""
    return new_service()


@pytest.fixture(scope="module")
def connect(runner: asyncio.Runner) -> Iterator[Connect]:
    """Serves a door: a stub and its channel."""
    ends: list[Callable[[], Awaitable[None]]] = []

    def connect_(door: GrpcDoor, config: ServeConfig | None = None) -> tuple[Any, grpc.aio.Channel]:
        async def open_() -> tuple[Any, grpc.aio.Channel]:
            server, port = await start_server(door, config or ServeConfig())
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
            ends.extend([channel.close, lambda: server.stop(None)])
            return manta_pb2_grpc.MantaStub(channel), channel

        return runner.run(open_())

    async def close() -> None:
        for end in ends:
            await end()

    yield connect_
    runner.run(close())


@pytest.fixture(scope="module")
def stub(service: Service, connect: Connect) -> Any:
    return connect(GrpcDoor(service, ServeConfig(), ApiKeys()))[0]


@pytest.fixture(scope="module")
def answer(runner: asyncio.Runner) -> Callable[[Awaitable[Any]], Any]:
    """Waits for what a method answers."""

    def answer_(call: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await call

        return runner.run(wait())

    return answer_


@pytest.fixture
def generate(runner: asyncio.Runner, stub: Any) -> Callable[..., list[pb.GenerateResponse]]:
    """All responses to one request."""

    def generate_(request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        return runner.run(consumed(stub.Generate(request)))

    return generate_
