"""A service in this process, which answers by the very code that is behind the endpoint.

Imports the service and what stands behind the paths of the endpoint; no ray: the cluster comes from outside.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import msgspec

from cluster.engine import EngineError
from deploy.batch.backends.backend import LineAnswer
from deploy.batch.lines import BatchRequest
from deploy.config.load import Config
from deploy.config.serve import ServeConfig, model_name
from deploy.doors.access import Caller
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.http.by_model import named_in
from deploy.doors.openai.generation.chat import Chat
from deploy.doors.openai.generation.completions import Completions
from deploy.doors.openai.requests.reading import read
from deploy.doors.openai.requests.schemas import ChatRequest, CompletionRequest
from deploy.doors.warnings import Warnings
from deploy.frontend.clusters import Cluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.text.adapters import Adapters
from scheduler.protocol.messages import Adapter
from scheduler.server.stats import ClusterStatus
from workers.model.sources.find import find_checkpoint

POLL_S = 0.1
CHAT_URL = "/v1/chat/completions"


class ServiceBackend:
    """Requests are read, checked and answered as at the endpoint. adapters: LoRA adapters, which requests name as models."""

    def __init__(self, service: Service, limits: ServeConfig, adapters: Iterable[Adapter] = ()) -> None:
        self._strict = limits.strict_fields
        self._cluster = service.cluster
        self._first = _Doors(service, limits)
        self._adapted = {
            adapter.name: _Doors(service.adapted(service.model.adapted(adapter, service.model.created)), limits)
            for adapter in adapters
        }

    async def answer(self, request: BatchRequest) -> LineAnswer:
        caller, body, warnings, strict = Caller(request.id), request.body, Warnings(), self._strict
        doors = self._adapted.get(named_in(body) or "", self._first)
        try:
            if request.url == CHAT_URL:
                whole = await doors.chat.whole(read(body, ChatRequest, warnings, strict=strict), caller, warnings)
            else:
                asked = read(body, CompletionRequest, warnings, strict=strict)
                whole = await doors.completions.whole(asked, caller, warnings)
        except RequestError as error:
            if error.fault is Fault.UNAVAILABLE:
                _refuse_stopped(await self._cluster.status())
            raise
        tokens = whole.usage.completion_tokens if whole.usage else 0
        return LineAnswer(200, msgspec.json.encode(whole), tokens, tuple(warnings))


class _Doors:
    """Of one model."""

    def __init__(self, service: Service, limits: ServeConfig) -> None:
        grammars = Grammars(service.model)
        self.completions = Completions(service, limits, grammars)
        self.chat = Chat(service, limits, grammars)


@asynccontextmanager
async def open_service(cluster: Cluster, config: Config) -> AsyncIterator[Service]:
    """A connected service of a cluster that is ready.

    Errors: EngineError if that takes longer than `start_timeout_s`; ValueError, OSError if the checkpoint cannot be read.
    """
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(config.engine.start_timeout_s):
                service = await stack.enter_async_context(_running(Service(await _model(cluster, config), cluster)))
                while not service.connected:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise EngineError(
                f"no group could be reached within {config.engine.start_timeout_s:g} s: raise start_timeout_s"
            ) from None
        yield service


@asynccontextmanager
async def open_backend(cluster: Cluster, config: Config) -> AsyncIterator[ServiceBackend]:
    """Errors: as `open_service`. Requests have the time that they need: nobody waits for one of them."""
    async with open_service(cluster, config) as service:
        engine = replace(config.engine, model=str(service.model.checkpoint))
        adapters = await asyncio.to_thread(Adapters, engine, service.model.name)
        yield ServiceBackend(service, replace(config.serve, request_timeout_s=math.inf), adapters)


async def _model(cluster: Cluster, config: Config) -> ServedModel:
    while not (status := await cluster.status()).ready:
        _refuse_stopped(status)
        await asyncio.sleep(POLL_S)
    name = model_name(config.serve.served_model_name, status.model)
    engine = replace(config.engine, model=status.model, revision=status.revision)
    folder = await asyncio.to_thread(find_checkpoint, engine)
    return await asyncio.to_thread(
        ServedModel.read, name, folder, engine.max_model_len, engine.tensor_parallel_size,
        config.serve.chat_template, engine.pooling, engine.score_tokens, engine,
    )  # fmt: skip


def _refuse_stopped(status: ClusterStatus) -> None:
    """Errors: EngineError."""
    if status.phase == "stopped":
        raise EngineError("; ".join(status.progress[-1:]) or "the cluster was stopped")


@asynccontextmanager
async def _running(service: Service) -> AsyncIterator[Service]:
    task = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
