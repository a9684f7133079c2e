"""The same door behind Ray Serve: its own proxy, and HAProxy before replicas that serve gRPC themselves."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.doors.grpc.writing import merged
from deploy.proto import manta_pb2 as pb
from deploy.proto import manta_pb2_grpc
from tests.deploy.doors.grpc.calls import consumed, endless, text, until
from tests.shared.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[4]
KEY = [("authorization", "Bearer secret")]
Code = grpc.StatusCode


class Endpoint:
    """A Serve instance that somebody else ends."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self._process = process
        self._port = port

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._port}") as opened:
            yield opened

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        async with self.channel() as opened:
            yield manta_pb2_grpc.MantaStub(opened)

    async def under_way(self) -> list[list[int]]:
        """[requests, held blocks] of each replica."""
        return await asyncio.to_thread(self._ask)

    async def is_free(self) -> None:
        async def free() -> bool:
            return await self.under_way() == [[0, 0], [0, 0]]

        await until(free)

    def _ask(self) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module", params=["0", "1"], ids=["proxy", "haproxy"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    *ports, metrics_port, stats_port = free_ports(4)
    haproxy = {
        "RAY_SERVE_ENABLE_HA_PROXY": request.param, "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port), "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
    }  # fmt: skip
    environ = os.environ | haproxy | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.deploy.doors.grpc.ray_app", *map(str, ports)]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started = Endpoint(process, ports[0])
        asyncio.run(_wait_serving(started))
        yield started
        assert process.stdin is not None
        process.stdin.close()


async def _wait_serving(endpoint: Endpoint) -> None:
    """By the health service, as clients of a server that starts do."""
    async with endpoint.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def serving() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):  # no application, no replica yet
                answer = await health.Check(health_pb2.HealthCheckRequest(service="manta.v1.Manta"), wait_for_ready=True)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
            return False

        await until(serving)


def test_streams_and_answers(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with endpoint.stub() as stub:
            asked = text(temperature=0.0, max_tokens=24)
            parts = await consumed(stub.Generate(asked, metadata=KEY))
            assert len(parts) > 1
            assert all(part.choices for part in parts)
            batch = pb.GenerateBatchRequest(requests=[asked, text(n=0, request_id="bad")])
            good, bad = (await stub.GenerateBatch(batch, metadata=KEY)).results
            assert good.response.choices == merged(parts).choices
            assert (bad.error.code, bad.error.param) == (Code.INVALID_ARGUMENT.value[0], "n")
            models = (await stub.ListModels(pb.ListModelsRequest(), metadata=KEY)).models
            assert [model.name for model in models] == ["tiny"]
            tokens = await stub.Tokenize(pb.TokenizeRequest(prompt=asked.prompt), metadata=KEY)
            assert len(tokens.token_ids) == good.response.usage.prompt_tokens

    asyncio.run(scenario())


def test_refusals_come_with_their_metadata(endpoint: Endpoint) -> None:
    full = text()
    full.cache_salt = "full"

    async def status(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (consumed(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
        trailing = {name: value for name, value in refused.value.trailing_metadata() if name != "request_id"}  # Serve's own
        return refused.value.code(), trailing

    async def scenario() -> None:
        async with endpoint.stub() as stub:
            busy = {"retry-after": "4", "error-code": "queue_full"}
            assert await status(stub.Generate(full, metadata=KEY)) == (Code.RESOURCE_EXHAUSTED, busy)
            unknown = {"error-code": "invalid_api_key"}
            assert await status(stub.Generate(full)) == (Code.UNAUTHENTICATED, unknown)
            assert await status(stub.ListModels(pb.ListModelsRequest())) == (Code.UNAUTHENTICATED, unknown)
            nothing = {"error-param": "prompt"}
            assert await status(stub.Tokenize(pb.TokenizeRequest(), metadata=KEY)) == (Code.INVALID_ARGUMENT, nothing)

    asyncio.run(scenario())


def test_cancelled_calls_free_their_blocks(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with endpoint.stub() as stub:
            stream = stub.Generate(endless(), metadata=KEY)
            batch = stub.GenerateBatch(pb.GenerateBatchRequest(requests=[endless(), endless()]), metadata=KEY)
            await stream.read()

            async def all_run() -> bool:
                return sum(requests for requests, _ in await endpoint.under_way()) == 3

            await until(all_run)
            stream.cancel()
            batch.cancel()
            await endpoint.is_free()

    asyncio.run(scenario())


def test_a_deadline_ends_a_stream(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with endpoint.stub() as stub:
            stream = stub.Generate(endless(), metadata=KEY, timeout=1.0)
            assert await stream.code() is Code.DEADLINE_EXCEEDED
            await endpoint.is_free()

    asyncio.run(scenario())


def test_an_abort_finds_the_replica_of_its_request(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with endpoint.stub() as stub:
            streams = {name: aiter(stub.Generate(endless(request_id=name), metadata=KEY)) for name in "abcd"}
            for name, stream in streams.items():
                await anext(stream)
                assert (await stub.Abort(pb.AbortRequest(request_id=name), metadata=KEY)).aborted == 1
            for name, stream in streams.items():
                with pytest.raises(grpc.aio.AioRpcError, match=repr(name)) as ended:
                    await consumed(stream)
                assert ended.value.code() is Code.CANCELLED
            await endpoint.is_free()

    asyncio.run(scenario())


def test_health_is_watched_and_reflection_answers(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with endpoint.channel() as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            Ask = reflection_pb2.ServerReflectionRequest
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = reflection.ServerReflectionInfo(iter([Ask(list_services=""), Ask(file_containing_symbol="manta.v1.Manta")]))
            names, file = [answer async for answer in call]
            assert {"manta.v1.Manta", "grpc.health.v1.Health"} <= {one.name for one in names.list_services_response.service}
            assert file.file_descriptor_response.file_descriptor_proto

    asyncio.run(scenario())
