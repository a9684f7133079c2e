"""The gRPC endpoint behind Ray Serve: the same door, inside an ingress replica.

What Serve does to a call, as of Ray 2.60, and what follows. Its own proxy:
- It finds the ingress by the application that the metadata names; with a single application it needs no name. It calls the
  method of the RPC's name, with the message and, since it has that parameter, `grpc_context`.
- It passes no deadline on. When the client's passes, the client says DEADLINE_EXCEEDED, the proxy cancels the call, and the
  replica's generator is closed: the request is aborted all the same.
- Code, details and trailing metadata reach the client along with a message, or, for an exception, without the metadata. So a
  stream that failed ends with one empty message that carries its status.
- It listens on all interfaces, without TLS; there is no option for either. Without API keys the door therefore answers only
  clients whose address is this machine's (unless the settings say `auth: false`).
Behind HAProxy, replicas serve gRPC themselves, on all interfaces too; HAProxy listens where HTTP does, and its address is the
one that the door sees. Health is asked of a replica in both cases, so it tells whether the *application* can serve; no answer,
NOT_FOUND or UNAVAILABLE mean that it cannot. `/ray.serve.RayServeAPIService/Healthz` is the proxy's own state.

Imports ray.
"""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from ray.serve.grpc_util import RayServegRPCContext

from deploy.doors.grpc.server import GrpcDoor
from deploy.proto import manta_pb2 as pb


class ServeContext:
    """A `Context` of Serve's."""

    def __init__(self, context: RayServegRPCContext) -> None:
        self._context = context
        self.failed = False

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return self._context.invocation_metadata()  # type: ignore[no-any-return]

    def peer(self) -> str:
        return str(self._context.peer())

    def time_remaining(self) -> None:
        """The proxy does not say."""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.failed = True
        self._context.set_code(code)

    def set_details(self, details: str) -> None:
        self._context.set_details(details)

    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, str]]) -> None:
        self._context.set_trailing_metadata(list(trailing_metadata))


class GrpcIngress:
    """What Serve's proxy calls on an ingress deployment. A deployment class inherits it and sets `door`."""

    door: GrpcDoor

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        context = ServeContext(grpc_context)
        async with aclosing(self.door.Generate(request, context)) as responses:
            async for response in responses:
                yield response
        if context.failed:
            yield pb.GenerateResponse()

    async def GenerateBatch(
        self, request: pb.GenerateBatchRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateBatchResponse:
        return await self.door.GenerateBatch(request, ServeContext(grpc_context))

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        return await self.door.Tokenize(request, ServeContext(grpc_context))

    async def Abort(self, request: pb.AbortRequest, grpc_context: RayServegRPCContext) -> pb.AbortResponse:
        return await self.door.Abort(request, ServeContext(grpc_context))

    async def ListModels(self, request: pb.ListModelsRequest, grpc_context: RayServegRPCContext) -> pb.ListModelsResponse:
        return await self.door.ListModels(request, ServeContext(grpc_context))

    async def Check(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        return await self.door.Check(request, ServeContext(grpc_context))

    async def List(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        return await self.door.List(request, ServeContext(grpc_context))

    async def Watch(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncGenerator[Any, None]:
        async with aclosing(self.door.Watch(request, ServeContext(grpc_context))) as responses:
            async for response in responses:
                yield response
