"""What a client may hold open: calls whose message does not arrive, and calls at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode as Code

from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.server import GrpcDoor
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from tests.deploy.doors.grpc.calls import consumed, endless, text
from tests.deploy.doors.grpc.conftest import Connect

Answer = Callable[[Awaitable[Any]], Any]


async def never() -> AsyncIterator[pb.TokenizeRequest]:
    await asyncio.Event().wait()
    yield pb.TokenizeRequest()


async def nothing() -> AsyncIterator[pb.TokenizeRequest]:
    return
    yield pb.TokenizeRequest()


@pytest.mark.parametrize(
    ("messages", "code", "said"),
    [(never, Code.DEADLINE_EXCEEDED, "message did not arrive within 0.5 s"), (nothing, Code.INVALID_ARGUMENT, "no message")],
)
@pytest.mark.parametrize(("kind", "method"), [("stream_unary", "Tokenize"), ("stream_stream", "Generate")])
def test_a_message_that_does_not_arrive_is_not_waited_for(
    answer: Answer, connect: Connect, service: Service, messages: Any, code: Code, said: str, kind: str, method: str
) -> None:
    config = ServeConfig(receive_timeout_s=0.5)
    _, channel = connect(GrpcDoor(service, config, ApiKeys()), config)

    async def call() -> grpc.aio.AioRpcError:
        begun = getattr(channel, kind)(f"/manta.v1.Manta/{method}")(messages())
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await (begun if kind == "stream_unary" else begun.read())
        return ended.value

    error = answer(call())
    assert error.code() is code
    assert said in str(error.details())


async def end_of(call: Any) -> Code:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await consumed(call)
    code: Code = await call.code()
    return code


def test_one_address_has_so_many_calls_under_way(answer: Answer, connect: Connect, service: Service) -> None:
    config = ServeConfig(max_connections=1)
    stub, _ = connect(GrpcDoor(service, config, ApiKeys()), config)

    async def calls() -> tuple[grpc.aio.AioRpcError, Code]:
        first = stub.Generate(endless())
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="a")))
        first.cancel()
        while (code := await end_of(stub.Generate(text(max_tokens=2)))) is Code.RESOURCE_EXHAUSTED:
            await asyncio.sleep(0.01)  # until the server has heard of the end
        return refused.value, code

    error, code = answer(calls())
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert "1 calls of this address are under way" in str(error.details())
    assert code is Code.OK
