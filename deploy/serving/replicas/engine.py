"""The `Engine` deployment: who owns the fleet of an endpoint on Ray Serve. Imports ray."""

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

import msgspec
from ray import serve
from ray.serve._private.application_state import StatusOverview
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from cluster.config import EngineConfig
from cluster.fleet.autoscale import Autoscaler
from cluster.fleet.estate import estate_of, version_of
from cluster.fleet.fleet import Fleet
from cluster.fleet.rolling import Roll, other_versions
from cluster.fleet.shelf import AdapterShelf
from cluster.launch import plan
from deploy.config.load import ModelSettings, reject_unknown
from deploy.config.serve import FURTHER, ServeConfig
from deploy.doors.openai.responses.store.shared import end_responses
from deploy.serving.replicas.attending import Attendant
from scheduler.logs import configure
from scheduler.protocol.sentinel import watch_this_process
from scheduler.server.stats import ClusterStatus

logger = logging.getLogger(__name__)

T = TypeVar("T")

LIVE_KEYS = ("groups",)
"""Of the Engine's `user_config`, which Serve hands to the replica that runs; all else starts the replicas anew."""
ASK_TIMEOUT_S = 10.0
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """What an Engine serves. threads: of each CPU rank. version: of it all."""

    config: ModelSettings
    threads: int
    version: str


class EngineReplica:
    """Owns the fleet. Serve starts another if it dies, is lost for good or shall be replaced; scheduler and groups run on
    meanwhile, and are taken over by that one. The end of the application is theirs.

    It comes up at once and starts the fleet beside: until that is ready, `status` says how far it is.

    further: of a model beside the first of an endpoint, which front ends find by what it is `told`. When its application ends,
    it waits for those of them that have requests under way.
    """

    def __init__(
        self, engine: EngineConfig, limits: ServeConfig, threads: int, version: str, *, further: bool = False
    ) -> None:  # fmt: skip
        configure(limits.log_format, role="engine")
        watch_this_process()
        self._attendant = Attendant()
        self._version = version
        self._told = engine, limits, threads
        self._further = further
        self._failure: str | None = None
        self._autoscaler: Autoscaler | None = None
        self._application = serve.get_replica_context().app_name
        self._estate = estate_of(self._application, version, engine)
        self._fleet = Fleet(engine, plan(engine, threads, self._estate), self._fail, limits, limits.log_format, self._estate)
        self._roll: Roll | None = None
        self._starter = threading.Thread(target=self._start, name="manta-starter", daemon=True)
        self._starter.start()

    async def version(self) -> str:
        """Of what is served from now on."""
        return self._version

    async def told(self) -> "ServedVersion":
        """What front ends have to know of what is served from now on."""
        engine, limits, threads = self._told
        return ServedVersion(ModelSettings(engine, limits), threads, self._version)

    async def wanted(self) -> int:
        """Groups that were asked for, by whatever has been deployed."""
        return self._fleet.wanted

    async def status(self, maps: bool = False, version: str | None = None) -> ClusterStatus | None:
        """version: of the front end that asks. None for one that is not served from here, or not any more."""
        if version not in (None, self._version):
            others = {fleet.version: fleet for fleet in (self._roll.old if self._roll is not None else ())}
            fleet = others.get(version or "")
            return await asyncio.to_thread(fleet.status, maps) if fleet is not None else None
        status = await asyncio.to_thread(self._fleet.status, maps)
        if self._failure is None:
            return status
        return msgspec.structs.replace(status, phase="failed", progress=(*status.progress, self._failure))

    async def drain(self, group: int, replace: bool) -> str | None:
        """Lets a group run empty, see `Fleet.drain`. Why it cannot; None: it does."""
        if replace and await asyncio.to_thread(version_of, *self._told) != self._version:
            return "the checkpoint is not the one that is served any more: deploy it as another (docs/deploy.md)"
        try:
            await asyncio.to_thread(self._fleet.drain, group, replace=replace)
        except ValueError as error:
            return str(error)
        return None

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """What of the configuration changes while requests run: `groups`. Serve calls it at the start and whenever
        `user_config` has changed. What cannot be done is logged and left as it is: an error would make Serve replace this
        replica."""
        try:
            reject_unknown(user_config, LIVE_KEYS, "user_config.")
            self._fleet.resize(msgspec.convert(user_config.get("groups", self._fleet.wanted), int))
        except ValueError as error:
            logger.error("this change of user_config is refused: %s", error)

    async def check_health(self) -> None:
        """Errors: RuntimeError once no group is left, the start has failed, or nobody of its estate answers: Serve then starts
        another replica."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        if self._fleet.cut_off:
            raise RuntimeError("neither the scheduler nor any rank answers this engine: it is cut off")

    def __del__(self) -> None:
        self._attendant.close()
        if self._is_over():
            if self._autoscaler is not None:
                self._autoscaler.close()
            if self._roll is not None:
                self._roll.close()
            self._fleet.close()
            end_responses(self._estate.namespace)
            with contextlib.suppress(Exception):  # Ray has gone, and with it what was written down
                AdapterShelf(self._estate.namespace).clear()

    def _is_over(self) -> bool:
        """Whether nobody will take over. Front ends that have requests of a further model are waited for."""
        if _is_wanted(self._application):
            return False
        if not self._further:
            _end_further(self._application)
            return True
        deadline_s = time.monotonic() + self._told[1].request_timeout_s
        while self._front_ends() and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
        return not _is_wanted(self._application)  # it may have been deployed again meanwhile

    def _front_ends(self) -> int:
        """Of all versions that are served here."""
        fleets = [self._fleet, *(self._roll.old if self._roll is not None else ())]
        return sum(fleet.status().front_ends for fleet in fleets)

    def _start(self) -> None:
        try:
            others = other_versions(self._estate)
            if others:
                logger.warning("%d other version(s) serve on, and make room for %s", len(others), self._version)
                self._roll = Roll(self._fleet, others)
            may_wait = others or self._further  # for room that others have
            self._fleet.start(logger.info, self._fleet.config.node_timeout_s if may_wait else None)
            self._autoscaler = Autoscaler.of(self._fleet)
        except Exception as error:
            logger.exception("the cluster could not be started")
            self._fail(f"the cluster could not be started: {error}")

    def _fail(self, reason: str) -> None:
        self._failure = reason


def _is_wanted(application: str) -> bool:
    """Whether Serve, which ends a replica of it, will start another, or says nothing: asked from that replica. What is left to
    nobody ends by itself in time; what is ended has clients that wait."""

    def ask() -> bool:
        now = serve.status().applications.get(application)
        return now is not None and now.status != ApplicationStatus.DELETING

    return _answer_of(ask) is not False


def further_name(endpoint: str, model: str) -> str:
    """Of the application of a model beside the first. It is in names of files, so not all of the model's is in it."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", model)
    return endpoint + FURTHER + (plain if plain == model else f"{plain}-{crc32(model.encode()):08x}")


def further_applications(endpoint: str) -> dict[str, str | None]:
    """Names of those that run, or come up, beside the application of an endpoint; each with why Serve has given it up, None: it
    has not. Errors: Ray's, Serve's."""
    client = _get_global_client(raise_if_no_controller_running=False)
    statuses = client.list_serve_statuses() if client is not None else []
    gone = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DELETING)
    return {
        each.name: _failure_of(each)
        for each in statuses if each.name.startswith(endpoint + FURTHER) and each.app_status.status not in gone
    }  # fmt: skip


def _failure_of(application: StatusOverview) -> str | None:
    """Why Serve has given it up, in a line; None: it has not."""
    if application.app_status.status != ApplicationStatus.DEPLOY_FAILED:
        return None
    messages = [each.message for each in application.deployment_statuses if each.status == DeploymentStatus.DEPLOY_FAILED]
    lines = "\n".join([application.app_status.message, *messages]).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "Serve has given it up")  # a traceback ends with it


def _end_further(endpoint: str) -> None:
    """The models beside the first end with their endpoint: nobody else reaches them."""

    def end() -> None:
        for name in further_applications(endpoint):
            serve.delete(name, _blocking=False)

    _answer_of(end)


def _answer_of(ask: Callable[[], T]) -> T | None:
    """Of Serve, from a replica that ends; None if there is none in time."""
    asked: Future[T] = Future()

    def answer() -> None:
        with contextlib.suppress(Exception):  # Serve itself has gone
            asked.set_result(ask())

    threading.Thread(target=answer, daemon=True).start()
    try:
        return asked.result(timeout=ASK_TIMEOUT_S)
    except TimeoutError:
        return None
