"""A service in this process, which answers by the very code that is behind the endpoint: on groups that are started for the
job, or on those of a Manta application that runs on the same Ray cluster.

Imports the service; the engine, and ray, once one is opened.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineError, OnDeltas, OnFailure, Progress
from deploy.batch.backend import Answer
from deploy.batch.lines import BatchRequest
from deploy.clusters import ServeCluster
from deploy.config import Config, ConfigError
from deploy.errors import Fault, RequestError
from deploy.llm import engine_starter
from deploy.openai.chat import Chat
from deploy.openai.completions import Completions
from deploy.openai.grammars import Grammars
from deploy.openai.jobs import Caller
from deploy.openai.reading import read
from deploy.openai.responses import ChatCompletion, Completion
from deploy.openai.schemas import ChatRequest, CompletionRequest
from deploy.serve_config import ServeConfig, model_name
from deploy.service import Cluster, ServedModel, Service
from scheduler.messages import Deltas
from scheduler.stats import ClusterStatus

POLL_S = 0.1
CHAT_URL = "/v1/chat/completions"


class ServiceBackend:
    """Requests are read, checked and answered as at the endpoint."""

    def __init__(self, service: Service, limits: ServeConfig) -> None:
        grammars = Grammars(service.model)
        self._cluster = service.cluster
        self._completions = Completions(service, limits, grammars)
        self._chat = Chat(service, limits, grammars)

    async def answer(self, request: BatchRequest) -> Answer:
        try:
            whole = await (self._converse(request) if request.url == CHAT_URL else self._complete(request))
        except RequestError as error:
            if error.fault is Fault.UNAVAILABLE:
                _refuse_stopped(await self._cluster.status())
            raise
        return Answer(200, msgspec.json.encode(whole), whole.usage.completion_tokens if whole.usage else 0)

    async def _complete(self, request: BatchRequest) -> Completion:
        asked = read(request.body, CompletionRequest)
        return await self._completions.whole(asked, await self._completions.job(asked, Caller(request.id)))

    async def _converse(self, request: BatchRequest) -> ChatCompletion:
        asked = read(request.body, ChatRequest)
        return await self._chat.whole(asked, await self._chat.job(asked, Caller(request.id)))


class JobCluster:
    """A `Cluster` whose groups live as long as the job.

    It starts when it is made, in the caller's thread, so that the start can be interrupted and its errors are the caller's; the
    service connects to it afterwards. If it is lost it stays so: the job ends, and another goes on. Errors: as `StartEngine`.
    """

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._config = config
        self._on_deltas: OnDeltas = _nobody_asked
        self._on_failure: OnFailure = lambda _: None
        self.lost: str | None = None
        self._engine = engine_starter(config)(config, lambda deltas: self._on_deltas(deltas), self._fail, progress)

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
        self._on_deltas, self._on_failure = on_deltas, on_failure
        if self.lost is not None:
            raise EngineError(self.lost)
        return self._engine

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        if self.lost is not None:
            return ClusterStatus(phase="stopped", model=self._config.model, progress=(self.lost,))
        stats = await asyncio.to_thread(self._engine.stats)
        return ClusterStatus(phase="ready", model=self._config.model, page_size=self._engine.page_size, engine=stats)

    def close(self) -> None:
        self._engine.close()

    def _fail(self, reason: str) -> None:
        self.lost = reason
        self._on_failure(reason)


def _nobody_asked(deltas: Deltas) -> None:
    raise AssertionError(f"deltas before the first request: {deltas}")


@contextmanager
def open_cluster(config: EngineConfig, app: str | None, progress: Progress) -> Iterator[Cluster]:
    """app: the Serve application whose groups the job shall use; None starts groups of its own, and ends them.

    Errors: ConfigError, ValueError, OSError for what was asked; EngineError for the rest.
    """
    if app is not None:
        yield _serve_cluster(config, app, progress)
        return
    cluster = JobCluster(config, progress)
    try:
        yield cluster
    finally:
        cluster.close()


def _serve_cluster(config: EngineConfig, app: str, progress: Progress) -> ServeCluster:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    address = config.ray_address or "auto"
    progress(f"joining the Ray cluster at {address}")
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
        return ServeCluster(serve.get_deployment_handle("Engine", app))
    except (RayServeException, ConnectionError) as error:
        raise ConfigError(f"no Manta application {app!r} on the Ray cluster at {address}: {error}") from error


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
        yield ServiceBackend(service, replace(config.serve, request_timeout_s=math.inf))


async def _model(cluster: Cluster, config: Config) -> ServedModel:
    while not (status := await cluster.status()).ready:
        _refuse_stopped(status)
        await asyncio.sleep(POLL_S)
    name, engine = model_name(config.serve.served_model_name, status.model), config.engine
    return await asyncio.to_thread(
        ServedModel.read, name, Path(status.model), engine.max_model_len, engine.tensor_parallel_size
    )


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
