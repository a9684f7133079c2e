"""Brings a cluster up on Ray and hands out its `Engine`: scheduler, groups, readiness; and takes everything down again.

Imports ray, `fleet`, `autoscale`, `join` and `remote`. The other side of `cluster.local.engine`.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

import ray

from cluster.config import EngineConfig, own_threads
from cluster.ending import Ending
from cluster.engine import EngineError, EngineLost, EngineStats, OnDeltas, OnFailure, Progress
from cluster.fleet.adoption import settled_for_groups, settled_for_scheduler
from cluster.fleet.autoscale import Autoscaler
from cluster.fleet.fleet import Fleet
from cluster.fleet.group import rank_resources
from cluster.join import connect_ray
from cluster.remote import SchedulerStream
from cluster.resolve import resolve
from scheduler.protocol.messages import Request, TalliedMetric
from scheduler.protocol.orphans import Estate
from workers.config import ResolvedWorker

logger = logging.getLogger(__name__)

FLEET_BY_S, RAY_BY_S = 5.5, 8.0
"""Since the end began: when scheduler and groups, then Ray, are killed that have not ended."""


def start_on_ray(config: EngineConfig, on_deltas: OnDeltas, on_failure: OnFailure, progress: Progress) -> "RayEngine":
    """See `cluster.engine.StartEngine`. Joins the Ray that is running or named, else starts one on this machine."""
    threads = own_threads(config)
    resolve(config, "cpu")  # the user's mistakes, before anything is started
    owns_ray = connect_ray(config, config.ranks * threads, progress)
    engine = RayEngine(config, on_failure, owns_ray=owns_ray)
    try:
        engine.start(plan(config, threads if owns_ray else 1), on_deltas, progress)
    except BaseException:
        engine.close()
        raise
    return engine


def plan(config: EngineConfig, threads: int = 1, estate: Estate | None = None) -> ResolvedWorker:
    """What the configuration comes to on the Ray cluster that this process has joined. threads: of a CPU rank. estate: where
    something of it runs, that is what was settled when it began, whatever node has gone since.

    Errors: CheckpointError, ValueError; EngineError if the cluster has no room.
    """
    settled = settled_for_scheduler(estate) if estate is not None else None
    if settled is not None:
        return settled
    try:
        return _settle(config, threads)
    except EngineError:
        settled = settled_for_groups(estate) if estate is not None else None
        if settled is None:
            raise
        return settled


def _settle(config: EngineConfig, threads: int) -> ResolvedWorker:
    device = config.device
    if device == "auto":
        device = "cuda" if config.accelerator_type or ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
    resolved = resolve(config, device, threads)
    on_a_node = _check_resources(config, rank_resources(config, resolved))
    return replace(resolved, host_ranks=min(config.groups, max(1, on_a_node)) * config.tensor_parallel_size)


def _check_resources(config: EngineConfig, per_rank: dict[str, float]) -> int:
    """Returns how many groups have room on one node at most. Errors: EngineError that says what is missing, instead of waiting
    for a node that may never come."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places_of = [
        int(min(node.get(name, 0) // (amount * config.tensor_parallel_size) for name, amount in per_rank.items()))
        for node in nodes
    ]
    places = sum(places_of)
    if places < config.groups and config.max_groups is None:  # an autoscaler may bring nodes
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in per_rank.items())
        found = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in per_rank) for node in nodes)
        raise EngineError(
            f"{config.groups} group(s) of {config.tensor_parallel_size} rank(s) need {wanted} for each rank, a group's on one "
            f"node; the cluster's nodes have {found}: room for {places} group(s). Lower groups, tensor_parallel_size or "
            "threads, or add nodes"
        )
    return max(places_of, default=0)


class RayEngine:
    """The `Engine` of a Ray cluster of one's own: a fleet, and this process's stream to its scheduler."""

    def __init__(self, config: EngineConfig, on_failure: OnFailure, *, owns_ray: bool) -> None:
        self.block_size = config.block_size
        self._config = config
        self._on_failure = on_failure
        self._owns_ray = owns_ray
        self._fleet: Fleet | None = None
        self._autoscaler: Autoscaler | None = None
        self._stream: SchedulerStream | None = None
        self._closing = threading.Lock()
        self._closed = False
        self._gone: str | None = None

    def start(self, resolved: ResolvedWorker, on_deltas: OnDeltas, progress: Progress) -> None:
        """Errors: the first group's error."""
        self._fleet = Fleet(self._config, resolved, self._lost)
        self._fleet.start(progress)
        self._autoscaler = Autoscaler.of(self._fleet)
        self._connect(self._fleet, on_deltas)

    def _connect(self, fleet: Fleet, on_deltas: OnDeltas) -> None:
        address = fleet.current().address
        self._stream = SchedulerStream(address.host, address.port, address.token, on_deltas, self._on_failure)

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
        if self._stream is not None:
            self._stream.tally(metrics)

    def leave(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def reconnect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> None:
        """Errors: EngineLost once the last group is gone for good, or the engine closed; EngineError, OSError before."""
        if self._gone is None and not self._closed and self._fleet is not None:
            self._on_failure = on_failure
            self._connect(self._fleet, on_deltas)
        if self._gone is not None or self._closed:  # or meanwhile
            self.leave()
            raise EngineLost(self._gone or "the engine was shut down")

    def stats(self) -> EngineStats:
        """Errors: EngineError when the scheduler has gone."""
        status = self._fleet.status() if self._fleet is not None else None
        if status is None or status.engine is None:
            raise EngineError("the scheduler does not answer")
        return status.engine

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        with Ending() as ending:
            ending.give(FLEET_BY_S, self._close_fleet)
            if self._owns_ray:
                ending.end_ray(RAY_BY_S)

    def _close_fleet(self) -> None:
        if self._autoscaler is not None:
            self._autoscaler.close()
        if self._fleet is not None:
            self._fleet.stop()
        if self._stream is not None:
            self._stream.close()
        if self._fleet is not None:
            self._fleet.close()

    def _lost(self, reason: str) -> None:
        """The last group is gone for good."""
        self._gone = reason
        if self._stream is not None and not self._closed:
            self._stream.fail(reason)
