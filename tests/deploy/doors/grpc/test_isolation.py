"""What one API key has asked, no other key finds in the prefix cache, nor ends."""

import asyncio
from typing import Any

import grpc
import pytest

from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys, account
from deploy.doors.grpc.server import GrpcDoor
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from tests.deploy.doors.grpc.calls import consumed, endless, text
from tests.deploy.doors.grpc.conftest import Connect

KEYS = ("key of ann", "key of bob")


def cached(runner: asyncio.Runner, stub: Any, key: str, request: pb.GenerateRequest, batch: bool) -> int:
    metadata = (("authorization", f"Bearer {key}"),)
    if batch:

        async def ask() -> pb.GenerateBatchResponse:
            answer: pb.GenerateBatchResponse = await stub.GenerateBatch(
                pb.GenerateBatchRequest(requests=[request]), metadata=metadata
            )
            return answer

        return int(runner.run(ask()).results[0].response.usage.cached_tokens)
    return int(runner.run(consumed(stub.Generate(request, metadata=metadata)))[-1].usage.cached_tokens)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_key_finds_its_own_prompts(
    runner: asyncio.Runner, service: Service, connect: Connect, shared: bool, batch: bool
) -> None:
    stub, _ = connect(GrpcDoor(service, ServeConfig(share_prefix_cache=shared), ApiKeys(KEYS)))
    ann, bob = KEYS
    request = text(f"{shared} {batch}: the code of the safe is 4711. " * 10, max_tokens=1)
    assert cached(runner, stub, ann, request, batch) == 0
    known = cached(runner, stub, ann, request, batch)
    assert known > 50
    assert cached(runner, stub, bob, request, batch) == (known if shared else 0)
    request.cache_salt = f"16:{account(ann)}"
    assert cached(runner, stub, bob, request, batch) == 0


def test_a_key_ends_its_own_requests_alone(runner: asyncio.Runner, service: Service, connect: Connect) -> None:
    stub, _ = connect(GrpcDoor(service, ServeConfig(), ApiKeys(KEYS)))
    ann, bob = ((("authorization", f"Bearer {key}"),) for key in KEYS)

    async def scenario() -> None:
        call = stub.Generate(endless(request_id="of-ann"), metadata=ann)
        parts = aiter(call)
        await anext(parts)
        wanted = pb.AbortRequest(request_id="of-ann")
        assert (await stub.Abort(wanted, metadata=bob)).aborted == 0
        await anext(parts)
        assert (await stub.Abort(wanted, metadata=ann)).aborted == 1
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in parts:
                pass
        assert ended.value.code() is grpc.StatusCode.CANCELLED

    runner.run(scenario())
