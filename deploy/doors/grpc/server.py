"""The gRPC endpoint: what each method of `manta.proto` does, once for both transports, and a plain server for one of them.

    client ──▶ grpc.aio server ──▶ GrpcDoor ──▶ Service          `start_server`: one process, one service
    client ──▶ Serve's proxy ──Ray──▶ GrpcDoor ──▶ Service       `ingress`: the door is in the ingress replica

Imports grpc, no ray. An error is the call's status: it never leaves a method as an exception.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deploy.config.serve import ServeConfig, is_loopback
from deploy.doors.access import ApiKeys, Caller
from deploy.doors.connections import BoundedCalls
from deploy.doors.grpc.reading import Readers, check_size, named
from deploy.doors.grpc.writing import Writer, card, merged
from deploy.doors.openai.errors import error_headers
from deploy.doors.openai.requests.reading import at_most
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from deploy.proto import manta_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Manta"].full_name
HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SERVICER_FUNCTIONS = (
    "deploy.proto.manta_pb2_grpc.add_MantaServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""For Serve's `gRPCOptions`: the services that its proxy passes on to the ingress. It adds reflection by itself."""

HEALTH_NAMES = ("", SERVICE_NAME)
"""Services that have a health: the server as a whole, and its one API. They share it."""

HEALTH_PERIOD_S = 1.0
"""How often a watcher of the health looks."""

IDLE_MS = 300_000
"""After which a connection without a call is closed; a client opens another when it needs it."""

MAX_DETAILS = 1024
"""Characters of a status message: it travels in a header, and 8 KiB are all that headers may take."""

STATUS = {
    Fault.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Fault.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Fault.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Fault.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Fault.TOO_SLOW: grpc.StatusCode.DEADLINE_EXCEEDED,
    Fault.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    Fault.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself says it; without retry-after
    Fault.UNPROCESSABLE: grpc.StatusCode.INVALID_ARGUMENT,
    Fault.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,  # with retry-after
    Fault.CANCELLED: grpc.StatusCode.CANCELLED,
    Fault.INTERNAL: grpc.StatusCode.INTERNAL,
    Fault.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Fault.TIMED_OUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""How a fault is said here. Trailing metadata has the rest: retry-after (seconds), error-code, error-param."""

AbortEverywhere = Callable[[str, str], Awaitable[int]]
"""Request id, and the account whose requests may be ended ("": everybody's) -> how many were, in all processes."""


class Context(Protocol):
    """What both transports know of a call, and take as its status."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def peer(self) -> str: ...

    def time_remaining(self) -> float | None:
        """Seconds to the client's deadline; None if it has none, or if the transport keeps it to itself."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, str]]) -> None: ...


class GrpcDoor:
    """The methods of `manta.v1.Manta` and `grpc.health.v1.Health`, under the names that both transports look for.

    A call that fails sets its status on the context and returns early, with an empty message where one must be.
    """

    def __init__(
        self, service: Service, config: ServeConfig, keys: ApiKeys, abort_everywhere: AbortEverywhere | None = None,
        further: FurtherModels | None = None, is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """service: of the first model. abort_everywhere: None where this process has all requests. further: models beside the
        first. is_leaving: this process ends when nothing is under way in it."""
        self._first = service
        self._further = FurtherModels() if further is None else further
        self._config = config
        self._keys = keys
        self._own_machine_only = config.auth and not keys  # Serve's proxy listens on all interfaces, whatever `host` says
        self._abort_everywhere = abort_everywhere
        self._is_leaving = is_leaving
        self._readers = Readers(service, config, self._further)

    # ---- manta.v1.Manta ----

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Cancelling or closing it aborts the request."""
        with _reported(context, request.request_id):
            self._check(request, context)
            async with aclosing(self._responses(request, context)) as responses:
                async for response in responses:
                    yield response

    async def GenerateBatch(self, request: pb.GenerateBatchRequest, context: Context) -> pb.GenerateBatchResponse:
        """Side by side, each for itself. Cancelling aborts them all."""
        with _reported(context):
            self._check(request, context)
            at_most("requests", len(request.requests), self._config.max_prompts, "max_prompts")
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._result(one, context)) for one in request.requests]
            return pb.GenerateBatchResponse(results=[task.result() for task in tasks])
        return pb.GenerateBatchResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        with _reported(context):
            self._check(request, context)
            reader = self._readers.of(request.model)
            prompt = await reader.prompt(request.prompt)
            limit = reader.service.model.limits.max_tokens
            return pb.TokenizeResponse(token_ids=prompt.token_ids, max_model_len=limit)
        return pb.TokenizeResponse()

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        with _reported(context, request.request_id):
            self._check(request, context)
            if not request.request_id:
                raise RequestError.invalid("request_id is missing: say which request shall end", "request_id")
            whose = request.request_id, self._account(context)
            if self._abort_everywhere is None:
                return pb.AbortResponse(aborted=sum(service.abort(*whose) for service in self._services()))
            return pb.AbortResponse(aborted=await self._abort_everywhere(*whose))
        return pb.AbortResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        with _reported(context):
            self._check(request, context)
            further = (card(each.service.model) for each in self._further.listed())
            return pb.ListModelsResponse(models=[card(self._first.model), *further])
        return pb.ListModelsResponse()

    # ---- grpc.health.v1.Health ----

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """SERVING: this process reaches the scheduler of a model of which at least one group is up. Needs no key."""
        status = await self._health(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"no service {request.service!r} here: ask for {SERVICE_NAME!r}, or for none")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:  # noqa: ARG002
        """Of every service by its name."""
        answer = health_pb2.HealthCheckResponse(status=await self._health(""))
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(HEALTH_NAMES, answer))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context  # noqa: ARG002
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:  # fmt: skip
        """The same at once, and whenever it has changed. It ends where this process would end but for those who watch: they
        ask again, as the protocol has it, and meet another one."""
        told = None
        while not self._is_leaving():
            status = await self._health(request.service)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(HEALTH_PERIOD_S)

    async def _health(self, name: str) -> Any:
        if name not in HEALTH_NAMES:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        ready = await asyncio.gather(*(service.ready() for service in self._services()))
        return health_pb2.HealthCheckResponse.SERVING if any(ready) else health_pb2.HealthCheckResponse.NOT_SERVING

    def _services(self) -> list[Service]:
        """Of all models."""
        return [self._first, *(model.service for model in self._further)]

    # ---- one request ----

    def _check(self, request: Any, context: Context) -> None:
        """Errors: RequestError."""
        if self._own_machine_only and not _is_own(context.peer()):
            said = "without API keys this server answers its own machine only: give it some (api_key_file), or say --no-auth"
            raise RequestError(Fault.UNAUTHENTICATED, said)
        self._account(context)
        check_size(request.ByteSize(), self._config)

    def _account(self, context: Context) -> str:
        """That of the call's API key, "" where there are no keys. Errors: RequestError."""
        return self._keys.check(_metadata(context, "authorization"))

    async def _responses(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Errors: RequestError."""
        caller = self._caller(request.request_id, context)
        reader = self._readers.of(request.model)
        prompt = await reader.request(request, caller)
        writer = Writer(caller.request_id, len(prompt.token_ids))
        generated = reader.service.generate([prompt], request_id=caller.request_id, traceparent=caller.traceparent)
        async with aclosing(generated) as deltas:
            async for _, delta in deltas:
                yield writer.response(delta)

    def _caller(self, request_id: str, context: Context) -> Caller:
        """Errors: RequestError."""
        account, patience_s = self._account(context), context.time_remaining()
        return Caller(
            named(request_id), _metadata(context, "traceparent"), account,
            self._keys.best_priority(account, self._config.best_priority), math.inf if patience_s is None else patience_s,
        )  # fmt: skip

    async def _result(self, request: pb.GenerateRequest, context: Context) -> pb.BatchResult:
        """One request of a batch, whole; its error is its result."""
        try:
            async with aclosing(self._responses(request, context)) as responses:
                return pb.BatchResult(response=merged([response async for response in responses]))
        except Exception as failure:
            error = _request_error(failure, request.request_id)
            code, _ = STATUS[error.fault].value
            told = pb.Error(
                request_id=request.request_id, code=code, message=error.message, param=error.param or "",
                reason=error.code or "", retry_after_s=error.retry_after_s,
            )  # fmt: skip
            return pb.BatchResult(error=told)


@contextmanager
def _reported(context: Context, request_id: str = "") -> Iterator[None]:
    """Makes what went wrong the status of the call."""
    try:
        yield
    except Exception as failure:
        error = _request_error(failure, request_id)
        trailing = [*error_headers(error).items(), ("error-code", error.code), ("error-param", error.param)]
        context.set_code(STATUS[error.fault])
        context.set_details(error.message[:MAX_DETAILS])
        context.set_trailing_metadata([(name, value) for name, value in trailing if value])


def _request_error(failure: Exception, request_id: str) -> RequestError:
    if isinstance(failure, RequestError):
        return failure
    logger.error("a fault of the server's, request %s", request_id or "without an id", exc_info=failure)
    return RequestError(Fault.INTERNAL, "a fault of the server's; its log has it")


def _metadata(context: Context, name: str) -> str | None:
    values = (value for key, value in context.invocation_metadata() or () if key == name)
    value = next(values, None)
    return value if isinstance(value, str) else None


def address_of(peer: str) -> str:
    """Of a client as gRPC names it, `ipv4:127.0.0.1:50051` or `ipv6:%5B::1%5D:50051`; its whole name if it has no address."""
    kind, _, address = unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer


def _is_own(peer: str) -> bool:
    """Whether the client is on this machine."""
    return peer.startswith("unix:") or is_loopback(address_of(peer))


async def start_server(door: GrpcDoor, config: ServeConfig) -> tuple[grpc.aio.Server, int]:
    """A plain server, and the port that it listens on; `await server.stop(grace)` ends it. Errors: OSError."""
    timeout_ms = max(1, int(config.receive_timeout_s * 1000))
    options = [
        ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", config.max_request_bytes),
        ("grpc.server_handshake_timeout_ms", timeout_ms), ("grpc.max_connection_idle_ms", IDLE_MS),
    ]  # fmt: skip
    server = grpc.aio.server(interceptors=[BoundedCalls(config, address_of)], options=options)
    manta_pb2_grpc.add_MantaServicer_to_server(door, server)
    health_pb2_grpc.add_HealthServicer_to_server(door, server)
    reflection.enable_server_reflection((SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME), server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_insecure_port(f"{host}:{config.grpc_port or 0}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{config.grpc_port}: choose another grpc_port or host") from error
    await server.start()
    return server, port
