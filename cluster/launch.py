"""Brings a cluster up on Ray and hands out its `Engine`: scheduler, groups, readiness; and takes everything down again.

Imports ray, `group`, `health` and `remote`. The other side of `cluster.local`.
"""

import contextlib
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray

from cluster.config import EngineConfig
from cluster.engine import EngineError, EngineStats, OnDeltas, OnFailure, Progress
from cluster.group import GroupHandle, rank_resources
from cluster.health import GroupKeeper
from cluster.remote import SchedulerStream
from cluster.worker_config import resolve
from scheduler.actor import SchedulerActor
from scheduler.config import CoreConfig
from scheduler.messages import Request, TalliedMetric
from scheduler.stats import ClusterStatus
from workers.actor import SchedulerAddress
from workers.build import WorkerConfig

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0

_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Ray takes 127.0.0.1 for a mistake and puts the outward address in its place; the rest of the loopback range it keeps."""


def start_on_ray(config: EngineConfig, on_deltas: OnDeltas, on_failure: OnFailure, progress: Progress) -> "RayEngine":
    """See `cluster.engine.StartEngine`. Joins the Ray that is running or named, else starts one on this machine."""
    threads = _own_threads(config)
    resolve(config, "cpu", 1, threads)  # the user's mistakes, before anything is started
    owns_ray = _connect(config, config.groups * config.tensor_parallel_size * threads, progress)
    engine = RayEngine(config, on_failure, owns_ray=owns_ray)
    try:
        device = "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
        ranks = config.groups * config.tensor_parallel_size
        core, worker = resolve(config, device, ranks, threads if owns_ray else 1)
        _check_resources(config, worker)
        engine.start(core, worker, on_deltas, progress)
    except BaseException:
        engine.close()
        raise
    return engine


def _own_threads(config: EngineConfig) -> int:
    """CPU threads of a rank on a Ray of our own: the cores, shared out."""
    ranks = config.groups * config.tensor_parallel_size
    return config.threads or max(1, (os.cpu_count() or 1) // ranks)


def _connect(config: EngineConfig, cpus: int, progress: Progress) -> bool:
    """True if the cluster is ours, to be shut down with the engine.

    A cluster of our own counts logical CPUs, as many as the ranks want: they share the cores of this machine.
    """
    if ray.is_initialized():
        return False
    if config.ray_address is not None:
        progress(f"joining the Ray cluster at {config.ray_address}")
        ray.init(address=config.ray_address, log_to_driver=False)
        return False
    progress("starting Ray on this machine")
    ray.init(
        num_cpus=max(cpus, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=_LOOPBACK,
    )
    return True


def _check_resources(config: EngineConfig, worker: WorkerConfig) -> None:
    """Errors: EngineError that says what is missing, instead of waiting for a node that may never come."""
    per_rank = rank_resources(worker)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(
        int(min(node.get(name, 0) // (amount * config.tensor_parallel_size) for name, amount in per_rank.items()))
        for node in nodes
    )
    if places < config.groups:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in per_rank.items())
        found = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in per_rank) for node in nodes)
        raise EngineError(
            f"{config.groups} group(s) of {config.tensor_parallel_size} rank(s) need {wanted} for each rank, a group's on one "
            f"node; the cluster's nodes have {found}: room for {places} group(s). Lower groups, tensor_parallel_size or "
            "threads, or add nodes"
        )


class RayEngine:
    """The `Engine` of a Ray cluster: the scheduler actor's socket, and a keeper for each group."""

    def __init__(self, config: EngineConfig, on_failure: OnFailure, *, owns_ray: bool) -> None:
        self.page_size = config.block_size
        self._config = config
        self._on_failure = on_failure
        self._owns_ray = owns_ray
        self._scheduler: Any = None
        self._stream: SchedulerStream | None = None
        self._keepers: list[GroupKeeper] = []
        self._handles: list[GroupHandle] = []
        self._gone: set[int] = set()
        self._closing = threading.Lock()
        self._closed = False

    def start(self, core: CoreConfig, worker: WorkerConfig, on_deltas: OnDeltas, progress: Progress) -> None:
        """Scheduler first, then all groups side by side. Errors: the first group's error."""
        config = self._config
        deadline = time.monotonic() + config.start_timeout_s
        token = secrets.token_hex(16)
        progress("starting the scheduler")
        actor = ray.remote(SchedulerActor).options(num_cpus=0, max_restarts=0, max_task_retries=0)
        self._scheduler = actor.remote(core, token, config.check_invariants)
        host, port = ray.get(self._scheduler.listen.remote(), timeout=config.start_timeout_s)
        address = SchedulerAddress(host, port, token)
        ray.get([self._scheduler.expect.remote(group) for group in range(config.groups)], timeout=CALL_TIMEOUT_S)
        self._handles = [GroupHandle(group, 0, config.tensor_parallel_size, worker) for group in range(config.groups)]
        progress(f"loading {config.model} on {config.groups} group(s) of {config.tensor_parallel_size} {worker.device} rank(s)")
        self._start_groups(address, deadline)
        self._await_ready(deadline)
        self._stream = SchedulerStream(host, port, token, on_deltas, self._on_failure)
        for handle in self._handles:
            self._keepers.append(self._keeper(handle, worker, address))
            self._keepers[-1].start()
        progress(f"{config.groups} group(s) are ready")

    # ---- Engine

    def submit(self, requests: Sequence[Request]) -> None:
        if self._stream is None or self._closed:
            raise EngineError("the engine was shut down")
        self._stream.submit(requests)

    def abort(self, streams: Sequence[int]) -> None:
        if self._stream is not None:
            self._stream.abort(streams)

    def stop(self, stream: int, keep_tokens: int) -> None:
        if self._stream is not None:
            self._stream.stop(stream, keep_tokens)

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        if self._stream is None or self._closed:
            raise EngineError("the engine was shut down")
        self._stream.tally(metrics)

    def stats(self) -> EngineStats:
        """Errors: EngineError when the scheduler has gone."""
        try:
            status: ClusterStatus = ray.get(self._scheduler.status.remote(), timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise EngineError(f"the scheduler does not answer: {error}") from error
        assert status.engine is not None, "a scheduler always knows its engine"
        return status.engine

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for keeper in self._keepers:
            keeper.stop()
        if self._stream is not None:
            self._stream.close()
        with contextlib.suppress(Exception):  # nothing may keep the rest from being ended
            if self._scheduler is not None:
                ray.get(self._scheduler.close.remote(), timeout=5.0)
        for keeper in self._keepers:
            with contextlib.suppress(Exception):
                keeper.close()
        for handle in self._handles:  # those that got no keeper because the start failed
            with contextlib.suppress(Exception):
                handle.kill()
        with contextlib.suppress(Exception):
            if self._scheduler is not None:
                ray.kill(self._scheduler)
        if self._owns_ray:
            ray.shutdown()

    # ---- groups

    def _start_groups(self, address: SchedulerAddress, deadline: float) -> None:
        errors: list[BaseException] = []

        def start(handle: GroupHandle) -> None:
            try:
                handle.start(address, deadline)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=start, args=(handle,), daemon=True) for handle in self._handles]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            for thread in threads:
                thread.join(timeout=0.05)  # in slices, so that Ctrl-C is heard
        if errors:
            raise errors[0]

    def _await_ready(self, deadline: float) -> None:
        """A group is ready when its leader has greeted the scheduler."""
        while sum(group.up for group in self.stats().groups) < self._config.groups:
            for handle in self._handles:
                if (reason := handle.wait(0.02)) is not None:
                    raise EngineError(reason)
            if time.monotonic() > deadline:
                raise EngineError("the groups did not reach the scheduler in time: raise start_timeout_s")

    def _keeper(self, handle: GroupHandle, worker: WorkerConfig, address: SchedulerAddress) -> GroupKeeper:
        return GroupKeeper(
            handle,
            lambda epoch: GroupHandle(handle.group, epoch, handle.size, worker),
            self._scheduler,
            address,
            self._config.max_group_restarts,
            self._config.start_timeout_s,
            self._group_gone,
        )

    def _group_gone(self, group: int, reason: str) -> None:
        """Without any group left, the engine as a whole is lost."""
        with self._closing:
            self._gone.add(group)
            lost = len(self._gone) == self._config.groups and not self._closed
        if lost and self._stream is not None:
            self._stream.fail(reason)
