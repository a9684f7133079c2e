"""The replay itself: arrivals, ends of runs, failures, in the order of virtual time. One thread, no clock, no chance but seeds.

Imports the parts beside it and the core's errors.
"""

import heapq
import itertools
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from kvcache.hashing import hash_blocks
from kvcache.ids import GroupId
from scheduler.placement.limits import RequestRefused, blocks_for
from scheduler.placement.why import Decision
from scheduler.protocol.messages import NO_TOKEN, Deltas, Request
from scheduler.protocol.sampling import SamplingParams
from simulator.engines import ClusterShape, SimulatedEngine
from simulator.report import LatencyTarget, Outcome, ReplayRecord, outcome
from simulator.routers import ApproximateIndex, MirroredIndex, RoundRobin, Router, least_load, longest_prefix
from simulator.stopwatch import Stopwatch
from simulator.traces import TraceRequest

PROGRESS_STEP = 64

POLICIES: dict[str, str] = {
    "manta": "one core for all groups: route = allocate, by estimated time to first token",
    "manta-fetch": "the same, and prefixes are fetched from other groups where that is cheaper than to compute them",
    "manta-host": "the same, and each group keeps blocks that leave its pool in host memory",
    "round-robin": "independent engines in turn",
    "least-load": "independent engines, least work queued or running",
    "approximate": "independent engines, cost by the router's memory of what it sent where",
    "lagging": "independent engines, cost by copies of their indexes and loads that lag behind",
    "longest-prefix": "independent engines, longest prefix by their own indexes, then load",
    "precise": "independent engines, cost by their own indexes and loads, never stale: the best a router could know",
    "single-pool": "bound: one group with the compute and the blocks of all",
    "infinite": "bound: one group with the compute of all that never evicts",
}

BOUNDS = ("single-pool", "infinite")


@dataclass(frozen=True, slots=True)
class Outage:
    """A group whose workers die at `at_s` and are back, with empty pools, `down_s` later; virtual seconds."""

    group: int
    at_s: float
    down_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Drain:
    """A group that takes nobody new from `at_s` on; who still runs there `stay_s` later goes on elsewhere. Virtual seconds."""

    group: int
    at_s: float
    stay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """speed_up: divides the times between arrivals. lag_s: of the lagging router's view. drains: of Manta's groups alone."""

    shape: ClusterShape
    speed_up: float = 1.0
    seed: int = 0
    outages: tuple[Outage, ...] = ()
    drains: tuple[Drain, ...] = ()
    lag_s: float = 1.0
    target: LatencyTarget = field(default_factory=LatencyTarget)

    def __post_init__(self) -> None:
        if not (self.speed_up > 0 and self.lag_s >= 0):
            raise ValueError(f"speed_up={self.speed_up} must be above 0 and lag_s={self.lag_s} not below")
        touched = [("fail", outage.group) for outage in self.outages] + [("be drained", drain.group) for drain in self.drains]
        for what, group in touched:
            if not 0 <= group < self.shape.groups:
                raise ValueError(f"group {group} cannot {what}: there are groups 0 to {self.shape.groups - 1}")


def replay(
    trace: Listing[TraceRequest],
    policy: str,
    scenario: Scenario,
    progress: Callable[[int], object] | None = None,
    tell: Callable[[Decision], None] | None = None,
) -> Outcome:
    """Runs the whole trace under one policy.

    progress: told how many requests have ended, now and then. tell: of every decision of a core that has several groups.
    """
    return Replay(trace, policy, scenario, progress, tell).run()


class Replay:
    """One policy's run. Events are (time, order of creation, what to do); equal inputs give equal runs."""

    def __init__(
        self,
        trace: Listing[TraceRequest],
        policy: str,
        scenario: Scenario,
        progress: Callable[[int], object] | None,
        tell: Callable[[Decision], None] | None,
    ) -> None:
        self._trace = trace
        self._policy = policy
        self._scenario = scenario
        self._progress = progress
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now_s = 0.0
        self._record = ReplayRecord(len(trace))
        self._place = np.full(len(trace), -1, np.int64)  # the engine that has each request now
        one_core = policy.startswith("manta") or policy in BOUNDS
        shape = self._shape(one_core)
        parts = [range(shape.groups)] if one_core else [range(group, group + 1) for group in range(shape.groups)]
        self._block_size = shape.block_size
        self._stopwatch = Stopwatch()
        self._engines = [
            SimulatedEngine(part, shape, lambda: self._now_s, self._at, self._hear, self._stopwatch) for part in parts
        ]
        self._router = None if one_core else self._make_router()
        if one_core and tell is not None:  # routers decide before any core does: there is nothing to tell then
            self._engines[0].core.explain(tell)

    def run(self) -> Outcome:
        for request in self._trace:
            self._at(request.arrived_s / self._scenario.speed_up, partial(self._arrive, request))
        if self._policy not in BOUNDS:  # the bounds are of a cluster that nothing happens to
            for outage in self._scenario.outages:
                self._at(outage.at_s, partial(self._fail, outage))
        if self._policy.startswith("manta"):
            for drain in self._scenario.drains:
                self._at(drain.at_s, partial(self._drain, drain))
        while self._events:
            self._now_s, _, event = heapq.heappop(self._events)
            event()
        self._record.core_s = self._stopwatch.look()
        return outcome(self._policy, self._trace, self._engines, self._record, self._scenario.target)

    def _shape(self, one_core: bool) -> ClusterShape:
        """With what the policy's cores may do."""
        shape, policy = self._scenario.shape, self._policy
        shape = replace(
            shape,
            seed=self._scenario.seed,
            wait_for_prefix=one_core and shape.wait_for_prefix,
            prefix_fetch=policy in ("manta-fetch", "manta-host"),
            host_blocks=shape.host_blocks if policy == "manta-host" else 0,
        )
        if policy == "single-pool":
            return shape.pooled(shape.blocks * shape.groups)
        if policy == "infinite":
            tokens = [request.prompt_tokens + request.output_tokens for request in self._trace]
            return shape.pooled(sum(blocks_for(each, shape.block_size) + 1 for each in tokens) + shape.blocks)
        return shape

    def _make_router(self) -> Router:
        shape = self._scenario.shape
        routers: dict[str, Router] = {
            "round-robin": RoundRobin(),
            "least-load": least_load,
            "approximate": ApproximateIndex(shape.groups, shape.blocks, shape.block_size),
            "lagging": MirroredIndex(shape.block_size, self._scenario.lag_s),
            "longest-prefix": longest_prefix,
            "precise": MirroredIndex(shape.block_size, 0.0),
        }
        return routers[self._policy]

    # ---- events

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), event))

    def _arrive(self, request: TraceRequest) -> None:
        self._record.arrived_s[request.number] = self._now_s
        self._submit(request)
        if request.number in (len(self._trace) // 2, len(self._trace) - 1):
            cores = [engine.core for engine in self._engines]
            self._record.marks.append((self._now_s, self._stopwatch.look(), sum(len(core.sequences) for core in cores)))

    def _submit(self, request: TraceRequest) -> None:
        tokens = request.tokens()
        hashes = hash_blocks(tokens, self._block_size)
        at = 0 if self._router is None else self._router(self._engines, hashes, len(tokens), self._now_s)
        self._place[request.number] = at
        sent = Request(
            request.number, tokens.tobytes(), np.array(hashes, np.uint64).tobytes(),
            SamplingParams(max_tokens=request.output_tokens),  # it ends there, since a simulated group knows no stop id
            priority=request.priority,
        )  # fmt: skip
        try:
            self._engines[at].call(lambda core: core.submit(0, sent))
        except RequestRefused:
            self._record.refused[request.number] = True

    def _fail(self, outage: Outage) -> None:
        """Manta's core moves the sequences itself; a router sends the requests again, from their beginning."""
        engine = self._engines[0 if self._router is None else outage.group]
        group = GroupId(outage.group)
        if group not in engine.groups:
            return
        engine.fail(group)
        self._at(self._now_s + outage.down_s, partial(engine.bring_up, group))
        if self._router is not None:
            lost = [number for _, number in engine.core.sequences]
            engine.call(lambda core: core.front_end_down(0))
            for number in lost:
                self._submit(self._trace[number])

    def _drain(self, drain: Drain) -> None:
        """Who still runs there after a while goes on elsewhere, unless the group is down or could not be spared."""
        engine, group = self._engines[0], GroupId(drain.group)

        def vacate() -> None:
            if group in engine.groups:
                engine.call(lambda core: core.vacate(group))

        if engine.call(lambda core: core.drain(group)):
            self._at(self._now_s + drain.stay_s, vacate)

    # ---- the front end

    def _hear(self, deltas: Deltas, first_tokens: bool) -> None:
        record = self._record
        streams = np.frombuffer(deltas.streams, np.int64)
        if first_tokens and len(streams):
            self._first_tokens(streams[np.frombuffer(deltas.tokens, np.int32) != NO_TOKEN])  # such reports have one step
        for finished in deltas.finished:
            record.ended_s[finished.stream] = self._now_s
            record.preemptions += finished.preemptions
            record.ended += 1
            if not record.ended % PROGRESS_STEP:
                self._stopwatch.look()
                if self._progress is not None:
                    self._progress(record.ended)

    def _first_tokens(self, streams: npt.NDArray[np.int64]) -> None:
        first_s = self._record.first_s
        first_s[streams[np.isnan(first_s[streams])]] = self._now_s
