"""The standard services beside Manta's: health tells whether a group is ready, reflection what there is."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.server import GrpcDoor
from deploy.frontend.service.service import Service
from tests.deploy.doors.grpc.conftest import Connect

Answer = Callable[[Awaitable[Any]], Any]
Status = health_pb2.HealthCheckResponse


def ask(name: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=name)


def test_health_needs_no_key_and_knows_its_services(answer: Answer, connect: Connect, service: Service) -> None:
    _, channel = connect(GrpcDoor(service, ServeConfig(), ApiKeys(["secret"])))
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "manta.v1.Manta"):
        assert answer(health.Check(ask(name))).status == Status.SERVING
    statuses = answer(health.List(health_pb2.HealthListRequest())).statuses
    assert {name: one.status for name, one in statuses.items()} == {"": Status.SERVING, "manta.v1.Manta": Status.SERVING}
    with pytest.raises(grpc.aio.AioRpcError, match="another") as unknown:
        answer(health.Check(ask("another")))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watcher_sees_the_service_come_up(runner: asyncio.Runner, connect: Connect, unconnected: Service) -> None:
    _, channel = connect(GrpcDoor(unconnected, ServeConfig(), ApiKeys()))
    health = health_pb2_grpc.HealthStub(channel)

    async def scenario() -> None:
        watch, other = health.Watch(ask("manta.v1.Manta")), health.Watch(ask("another"))
        assert (await watch.read()).status == Status.NOT_SERVING
        assert (await other.read()).status == Status.SERVICE_UNKNOWN
        running = asyncio.create_task(unconnected.run())
        assert (await watch.read()).status == Status.SERVING
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert (await watch.read()).status == Status.NOT_SERVING

    runner.run(scenario())


def test_a_watch_keeps_no_process_that_shall_end(runner: asyncio.Runner, connect: Connect, service: Service) -> None:
    leaving = asyncio.Event()
    _, channel = connect(GrpcDoor(service, ServeConfig(), ApiKeys(), is_leaving=leaving.is_set))
    health = health_pb2_grpc.HealthStub(channel)

    async def scenario() -> None:
        watch = health.Watch(ask())
        assert (await watch.read()).status == Status.SERVING
        leaving.set()
        assert await watch.read() is grpc.aio.EOF
        assert await watch.code() is grpc.StatusCode.OK

    runner.run(scenario())


def test_reflection_tells_the_contract(runner: asyncio.Runner, connect: Connect, service: Service) -> None:
    _, channel = connect(GrpcDoor(service, ServeConfig(), ApiKeys()))
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def scenario() -> None:
        Ask = reflection_pb2.ServerReflectionRequest
        call = reflection.ServerReflectionInfo(iter([Ask(list_services=""), Ask(file_containing_symbol="manta.v1.Manta")]))
        names, file = [response async for response in call]
        assert {"manta.v1.Manta", "grpc.health.v1.Health"} <= {one.name for one in names.list_services_response.service}
        (serialized,) = file.file_descriptor_response.file_descriptor_proto
        described = descriptor_pb2.FileDescriptorProto.FromString(serialized)
        methods = [method.name for method in described.service[0].method]
        assert methods == ["Generate", "GenerateBatch", "Tokenize", "Abort", "ListModels"]

    runner.run(scenario())
