"""How calls end early: cancelled, past their deadline, aborted by id. The request ends with them, and its blocks are back."""

import asyncio
from typing import Any

import grpc
import pytest

from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.server import GrpcDoor
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from tests.deploy.doors.grpc.calls import all_is_free, consumed, endless, until
from tests.deploy.doors.grpc.conftest import Connect


def test_a_cancelled_stream_frees_its_blocks(runner: asyncio.Runner, stub: Any, service: Service) -> None:
    async def scenario() -> None:
        call = stub.Generate(endless())
        await call.read()
        assert service.under_way == 1
        call.cancel()
        await all_is_free(service)

    runner.run(scenario())


def test_a_stream_that_nobody_reads_is_cancelled_too(runner: asyncio.Runner, stub: Any, service: Service) -> None:
    """The server then stands in a write that does not end, not in the engine's stream."""

    async def output_tokens() -> int:
        engine = (await service.cluster.status()).engine
        assert engine is not None
        return engine.output_tokens

    async def scenario() -> None:
        before = await output_tokens()
        call = stub.Generate(endless(n=8, logprobs=20))
        await call.read()

        async def far_beyond_a_window() -> bool:
            return await output_tokens() > before + 8 * 60  # 60 messages of 4 KiB; a window has 64 KiB

        await until(far_beyond_a_window)
        assert service.under_way == 1
        call.cancel()
        await all_is_free(service)

    runner.run(scenario())


def test_a_cancelled_batch_frees_its_blocks(runner: asyncio.Runner, stub: Any, service: Service) -> None:
    async def scenario() -> None:
        call = stub.GenerateBatch(pb.GenerateBatchRequest(requests=[endless(), endless()]))
        await until(lambda: service.under_way == 2)
        call.cancel()
        await all_is_free(service)

    runner.run(scenario())


def test_a_deadline_ends_a_stream(runner: asyncio.Runner, stub: Any, service: Service) -> None:
    async def scenario() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await consumed(stub.Generate(endless(), timeout=0.5))
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await all_is_free(service)

    runner.run(scenario())


def test_the_servers_own_limit_ends_a_stream(runner: asyncio.Runner, connect: Connect, service: Service) -> None:
    stub, _ = connect(GrpcDoor(service, ServeConfig(request_timeout_s=0.3), ApiKeys()))

    async def scenario() -> None:
        with pytest.raises(grpc.aio.AioRpcError, match=r"within 0\.3 s") as ended:
            await consumed(stub.Generate(endless()))
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await all_is_free(service)
        (result,) = (await stub.GenerateBatch(pb.GenerateBatchRequest(requests=[endless()]))).results
        assert result.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]

    runner.run(scenario())


def test_an_abort_by_id_ends_the_stream_as_cancelled(runner: asyncio.Runner, stub: Any, service: Service) -> None:
    async def scenario() -> None:
        stream = aiter(stub.Generate(endless(request_id="mine")))
        await anext(stream)
        assert (await stub.Abort(pb.AbortRequest(request_id="another"))).aborted == 0
        assert (await stub.Abort(pb.AbortRequest(request_id="mine"))).aborted == 1
        with pytest.raises(grpc.aio.AioRpcError, match="'mine' was aborted") as ended:
            await consumed(stream)
        assert ended.value.code() is grpc.StatusCode.CANCELLED
        await all_is_free(service)

    runner.run(scenario())


def test_one_request_of_a_batch_is_aborted_by_its_id(runner: asyncio.Runner, stub: Any, service: Service) -> None:
    async def scenario() -> None:
        requests = [endless(request_id="first"), endless(request_id="second")]
        requests[1].sampling.max_tokens = 40
        call = stub.GenerateBatch(pb.GenerateBatchRequest(requests=requests))
        await until(lambda: service.under_way == 2)
        assert (await stub.Abort(pb.AbortRequest(request_id="first"))).aborted == 1
        first, second = (await call).results
        assert first.error.code == grpc.StatusCode.CANCELLED.value[0]
        assert second.response.usage.completion_tokens == 40

    runner.run(scenario())


def test_an_abort_goes_wherever_the_request_may_be(runner: asyncio.Runner, connect: Connect, service: Service) -> None:
    asked: list[tuple[str, str]] = []

    async def everywhere(request_id: str, account: str) -> int:
        asked.append((request_id, account))
        return 3

    stub, _ = connect(GrpcDoor(service, ServeConfig(), ApiKeys(), everywhere))

    async def scenario() -> None:
        assert (await stub.Abort(pb.AbortRequest(request_id="far"))).aborted == 3

    runner.run(scenario())
    assert asked == [("far", "")]
