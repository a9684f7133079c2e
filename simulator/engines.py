"""What takes requests in a replay: a production core, and the simulated groups that it owns.

Manta is one engine with all groups; a deployment of independent engines behind a router is one engine for each group, with
its own queue and its own index. Imports the core and `groups`; told what time it is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvcache.ids import GroupId
from scheduler.config import CoreConfig
from scheduler.core import SchedulerCore
from scheduler.options import check
from scheduler.protocol.messages import Commands, Deltas, Report, Request
from scheduler.protocol.sampling import SamplingParams
from scheduler.server.shell import Shell
from simulator.groups import SimulatedGroup
from simulator.stopwatch import Stopwatch
from simulator.time_model import TimeModel
from simulator.transfers import LinkModel, SimulatedTransfers
from workers.config import BatchConfig
from workers.loop.batch import ResidentBatch

NEVER_S = float("inf")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ClusterShape(BatchConfig, CoreConfig):
    """Its core's settings, its groups' batches, and what a real cluster would measure: groups, each with a pool of `blocks`
    blocks, and so many in its host memory where the policy uses it."""

    groups: int = 8
    blocks: int = 8000
    host_blocks: int = 32000
    time: TimeModel = field(default_factory=TimeModel)
    links: LinkModel = field(default_factory=LinkModel)

    def __post_init__(self) -> None:
        check(self)
        for name in ("groups", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1: raise it")

    def pooled(self, blocks: int) -> "ClusterShape":
        """One group with the compute of all, and `blocks` blocks."""
        return replace(
            self, groups=1, blocks=blocks, max_num_seqs=min(self.max_num_seqs * self.groups, 1 << 15),
            max_num_batched_tokens=self.max_num_batched_tokens * self.groups, time=self.time.times(self.groups),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Features:
    """What a core may do beyond routing: wait for a prefix that is being computed, fetch one from another group, keep blocks in
    host memory."""

    wait_for_prefix: bool = False
    fetch: bool = False
    host: bool = False


class SimulatedEngine:
    """at: called with (when, what is to be called then) for every run of steps that begins or is cut short, and for transfers.
    hear: called with what the front end is told, and whether some of it may be first tokens: then it is of one step.

    stopwatch: of the time inside the core, as in the scheduler actor: the call, the groups' logs and the outbox.
    """

    def __init__(
        self,
        groups: Iterable[int],
        shape: ClusterShape,
        seed: int,
        at: Callable[[float, Callable[[], None]], None],
        hear: Callable[[Deltas, bool], None],
        stopwatch: Stopwatch,
        features: Features,
    ) -> None:
        self.core = SchedulerCore(
            replace(shape, wait_for_prefix=features.wait_for_prefix, prefix_fetch=features.fetch, seed=seed)
        )
        self._now_s = 0.0
        self._first_tokens = False  # whether some of what is being told may be first tokens
        self._shell = Shell(
            self.core,
            self._tell_group,
            lambda _, deltas: self._hear(deltas, self._first_tokens),
            clock=lambda: self._now_s,
            inside=stopwatch,
        )
        self.groups: dict[GroupId, SimulatedGroup] = {}
        self.computed = {GroupId(group): 0 for group in groups}  # prompt tokens, by former epochs of each group
        self._shape = shape
        self._features = features
        self._at = at
        self._transfers = SimulatedTransfers(shape.links, shape.block_size)
        self._looks_s = NEVER_S
        self._hear = hear
        self._epochs = dict.fromkeys(self.computed, 0)
        for group in self.computed:
            self.bring_up(group, 0.0)

    @property
    def up(self) -> bool:
        return bool(self.groups)

    def uncached(self) -> list[int]:
        """Prompt tokens that each group had to compute."""
        return [
            former + (self.groups[group].prefilled if group in self.groups else 0) for group, former in self.computed.items()
        ]

    # ---- events

    def submit(self, request: Request, now_s: float) -> None:
        """Errors: RequestRefused."""
        self._call(lambda core: core.submit(0, request), now_s)

    def _run_ended(self, group: GroupId, now_s: float) -> None:
        simulated = self.groups.get(group)
        if simulated is None or simulated.run is None or simulated.run.end_s != now_s:
            return  # it was cut short
        self._report(group, simulated.end(), now_s)
        if simulated.run is None:  # a command may have begun one already
            self._begin(group, now_s)

    def fail(self, group: GroupId, now_s: float) -> None:
        """Its workers die, and are coming back."""
        simulated = self.groups[group]
        if (last := simulated.interrupt(now_s)) is not None:
            self._report(group, last, now_s)
        del self.groups[group]
        self.computed[group] += simulated.prefilled
        self._transfers.group_down(group, now_s)
        self._expect_transfers()
        self._call(lambda core: core.group_down(group, "its workers died in the replay", returning=True), now_s)

    def drain(self, group: GroupId, now_s: float) -> bool:
        """It takes nobody new. False if it cannot be spared, or is down."""
        return self._call(lambda core: core.drain(group), now_s)

    def vacate(self, group: GroupId, now_s: float) -> None:
        """Who runs there goes on elsewhere."""
        if group in self.groups:
            self._call(lambda core: core.vacate(group), now_s)

    def forget_all(self, now_s: float) -> None:
        """The router sends elsewhere what it had sent here."""
        self._call(lambda core: core.front_end_down(0), now_s)

    def bring_up(self, group: GroupId, now_s: float) -> None:
        """Workers are ready, with empty pools."""
        shape, epoch = self._shape, self._epochs[group]
        self._epochs[group] += 1
        max_model_len = min(self.core.resolved.max_model_len, shape.blocks * shape.block_size + shape.block_size)
        batch = ResidentBatch(shape.max_num_seqs, shape.block_size, shape.max_num_batched_tokens, max_model_len)
        self.groups[group] = SimulatedGroup(epoch, batch, shape.time, self.core.resolved.grant_ahead)
        self._transfers.group_up(group, epoch)
        host_blocks = shape.host_blocks if self._features.host else 0
        ports = (f"group-{group}:0",) if self._features.fetch else ()
        self._call(
            lambda core: core.group_up(
                group, epoch, shape.blocks, shape.max_num_seqs, host_blocks=host_blocks, ports=ports
            ),
            now_s,
        )

    # ---- the shell

    def _report(self, group: GroupId, report: Report, now_s: float) -> None:
        self._first_tokens = report.steps == 1
        self._call(lambda core: core.report(group, report), now_s)
        self._first_tokens = False

    def _call(self, change: Callable[[SchedulerCore], T], now_s: float) -> T:
        self._now_s = now_s
        return self._shell.call(change)

    def _tell_group(self, group: GroupId, log: Commands) -> None:
        simulated = self.groups[group]
        simulated.take(log.commands, self._now_s)
        if simulated.run is None:
            self._begin(group, self._now_s)
        else:
            self._schedule(group, simulated.run.end_s)

    def _begin(self, group: GroupId, now_s: float) -> None:
        simulated = self.groups[group]
        simulated.begin(now_s)
        if simulated.run is not None:
            self._schedule(group, simulated.run.end_s)
        if simulated.movements:
            for movement in simulated.movements:
                self._transfers.begin(group, movement, now_s)
            simulated.movements.clear()
            self._expect_transfers()

    def _schedule(self, group: GroupId, when_s: float) -> None:
        self._at(when_s, partial(self._run_ended, group, when_s))

    def _expect_transfers(self) -> None:
        """Looks again when the first transfer that is under way will have arrived, if nothing happens until then."""
        when_s = self._transfers.next_s
        if when_s is not None and not self._looks_s <= when_s:
            self._looks_s = when_s
            self._at(when_s, partial(self._transferred, when_s))

    def _transferred(self, now_s: float) -> None:
        """Something may have arrived, unless what has begun meanwhile has slowed it down."""
        if now_s == self._looks_s:
            self._looks_s = NEVER_S
        for group, answer in self._transfers.finished(now_s):
            if group in self.groups:
                self._call(partial(SchedulerCore.moved, group_id=group, moved=answer), now_s)
        self._expect_transfers()


def as_request(number: int, tokens: npt.NDArray[np.int32], hashes: list[int], output: int, priority: int) -> Request:
    """As a front end would send it; it ends after exactly `output` tokens, since the simulated group knows no stop id."""
    encoded = np.array(hashes, np.uint64).tobytes()
    return Request(number, tokens.tobytes(), encoded, SamplingParams(max_tokens=output), priority=priority)
