"""What takes requests in a replay: a production core, and the simulated groups that it owns.

Manta is one engine with all groups; a deployment of independent engines behind a router is one engine for each group, with
its own queue and its own index. Imports the core and `groups`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from kvcache.ids import GroupId
from kvcache.layout import PoolSizes, divide
from scheduler.config.core import CoreConfig, Resolved
from scheduler.config.options import check
from scheduler.core import SchedulerCore
from scheduler.protocol.leaders import Commands, Report
from scheduler.protocol.messages import Deltas
from scheduler.server.shell import Shell
from scheduler.state.window import Window
from simulator.groups import SimulatedGroup
from simulator.stopwatch import Stopwatch
from simulator.time_model import TimeModel
from simulator.transfers import LinkModel, SimulatedTransfers
from workers.config import BatchConfig
from workers.loop.batch import ResidentBatch

NEVER_S = float("inf")

LONGEST_TOKENS = 1 << 17
"""A model's length, where memory has to be divided."""

BLOCK_PARTS = 1000
"""In so many a block of all layers is parted, to say what some of them take."""


@dataclass(frozen=True, kw_only=True)
class ClusterShape(BatchConfig, CoreConfig):
    """Its core's settings, its groups' batches, and what a real cluster would measure: groups, each with a pool of `blocks`
    blocks, and so many in its host memory where the policy uses it. window: tokens that every layer of the model sees; None:
    all. narrow: tokens that some layers see, whose part of a token's KV is `narrow_share`; None: there are none. `blocks` and
    `host_blocks` say then in which memory the pools of both kinds are."""

    window: int | None = None
    narrow: int | None = None
    narrow_share: float = 0.5
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
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} is below 1: raise it")
        if self.narrow is not None and (self.narrow < 1 or self.window is not None):
            raise ValueError(f"narrow={self.narrow} is below 1, or beside a window of all layers: raise it, or leave that out")
        if not 0 < self.narrow_share < 1:
            raise ValueError(f"narrow_share={self.narrow_share} is no part: choose one between 0 and 1")

    @property
    def resolved(self) -> Resolved:
        # A simulated group plans when it has reported: one chunk that it plans and one that it is granted meanwhile.
        return Resolved(window=self.window, prefill_ahead=2 * self.max_num_batched_tokens, narrow=self.narrow)

    def sizes(self, blocks: int) -> PoolSizes:
        """Of pools in the memory of so many blocks of all layers."""
        narrow = Window.of_narrow(self.resolved, self.block_size)
        if narrow is None or not blocks:
            return PoolSizes(blocks)
        theirs = round(self.narrow_share * BLOCK_PARTS)
        return divide(
            blocks * BLOCK_PARTS, BLOCK_PARTS - theirs, theirs, longest=min(blocks, LONGEST_TOKENS // self.block_size),
            rows=self.max_num_seqs, at_rest=narrow.at_rest(self.resolved.grant_ahead, self.block_size), at_once=narrow.most,
        )  # fmt: skip

    def pooled(self, blocks: int) -> "ClusterShape":
        """One group with the compute of all, and `blocks` blocks."""
        return replace(
            self, groups=1, blocks=blocks, max_num_seqs=min(self.max_num_seqs * self.groups, 1 << 15),
            max_num_batched_tokens=self.max_num_batched_tokens * self.groups, time=self.time.times(self.groups),
        )  # fmt: skip


class SimulatedEngine:
    """shape: what its core may do is in it: wait for a prefix that is being computed, fetch one, keep blocks in host memory.
    now: virtual time. at: called with (when, what is to be called then) for every run of steps that begins or is cut short, and
    for transfers. hear: called with what the front end is told, and whether some of it may be first tokens: then it is of one
    step.

    stopwatch: of the time inside the core, as in the scheduler actor: the call, the groups' logs and the outbox.
    """

    def __init__(
        self,
        groups: Iterable[int],
        shape: ClusterShape,
        now: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
        hear: Callable[[Deltas, bool], None],
        stopwatch: Stopwatch,
    ) -> None:
        self.core = SchedulerCore(shape, shape.resolved)
        self._first_tokens = False  # whether some of what is being told may be first tokens
        shell = Shell(
            self.core, self._tell_group, lambda _, deltas: hear(deltas, self._first_tokens), clock=now, inside=stopwatch
        )
        self.call = shell.call
        self.groups: dict[GroupId, SimulatedGroup] = {}
        self.computed = {GroupId(group): 0 for group in groups}  # prompt tokens, by former epochs of each group
        self._shape = shape
        self._now = now
        self._at = at
        self._transfers = SimulatedTransfers(shape.links, shape.block_size, 0.0 if shape.narrow is None else shape.narrow_share)
        self._looks_s = NEVER_S
        self._epochs = dict.fromkeys(self.computed, 0)
        for group in self.computed:
            self.bring_up(group)

    def uncached(self) -> list[int]:
        """Prompt tokens that each group had to compute."""
        return [
            former + (self.groups[group].prefilled if group in self.groups else 0) for group, former in self.computed.items()
        ]

    # ---- groups

    def bring_up(self, group: GroupId) -> None:
        """Workers are ready, with empty pools."""
        shape, epoch = self._shape, self._epochs[group]
        self._epochs[group] += 1
        max_model_len, sizes, host = self.core.resolved.max_model_len, shape.sizes(shape.blocks), shape.sizes(shape.host_blocks)
        if shape.window is None:
            max_model_len = min(max_model_len, sizes.blocks * shape.block_size + shape.block_size)
        batch = ResidentBatch(
            shape.max_num_seqs, shape.block_size, shape.max_num_batched_tokens, max_model_len, narrow=shape.narrow is not None
        )
        self.groups[group] = SimulatedGroup(epoch, batch, shape.time, self.core.resolved.grant_ahead)
        self._transfers.group_up(group, epoch)
        ports = (f"group-{group}:0",) if shape.prefix_fetch else ()
        self.call(
            lambda core: core.group_up(
                group, epoch, sizes.blocks, shape.max_num_seqs, host_blocks=host.blocks, ports=ports,
                narrow_blocks=sizes.narrow, host_narrow_blocks=host.narrow,
            )
        )

    def fail(self, group: GroupId) -> None:
        """Its workers die, and are coming back."""
        simulated = self.groups[group]
        if (last := simulated.interrupt(self._now())) is not None:
            self._report(group, last)
        del self.groups[group]
        self.computed[group] += simulated.prefilled
        self._transfers.group_down(group, self._now())
        self._expect_transfers()
        self.call(lambda core: core.group_down(group, "its workers died in the replay", returning=True))

    def _tell_group(self, group: GroupId, log: Commands) -> None:
        simulated = self.groups[group]
        simulated.take(log.commands, self._now())
        if simulated.run is None:
            self._begin(group)
        else:
            self._schedule(group, simulated.run.end_s)

    def _begin(self, group: GroupId) -> None:
        simulated = self.groups[group]
        simulated.begin(self._now())
        if simulated.run is not None:
            self._schedule(group, simulated.run.end_s)
        if simulated.movements:
            for movement in simulated.movements:
                self._transfers.begin(group, movement, self._now())
            simulated.movements.clear()
            self._expect_transfers()

    def _schedule(self, group: GroupId, when_s: float) -> None:
        self._at(when_s, partial(self._run_ended, group))

    def _run_ended(self, group: GroupId) -> None:
        simulated = self.groups.get(group)
        if simulated is None or simulated.run is None or simulated.run.end_s != self._now():
            return  # it was cut short
        self._report(group, simulated.end())
        if simulated.run is None:  # a command may have begun one already
            self._begin(group)

    def _report(self, group: GroupId, report: Report) -> None:
        self._first_tokens = report.steps == 1
        self.call(lambda core: core.report(group, report))
        self._first_tokens = False

    # ---- transfers

    def _expect_transfers(self) -> None:
        """Looks again when the first transfer that is under way will have arrived, if nothing happens until then."""
        when_s = self._transfers.next_s
        if when_s is not None and not self._looks_s <= when_s:
            self._looks_s = when_s
            self._at(when_s, self._transferred)

    def _transferred(self) -> None:
        """Something may have arrived, unless what has begun meanwhile has slowed it down."""
        if self._now() == self._looks_s:
            self._looks_s = NEVER_S
        for group, answer in self._transfers.finished(self._now()):
            if group in self.groups:
                self.call(partial(SchedulerCore.moved, group_id=group, moved=answer))
        self._expect_transfers()
