"""What takes requests in a replay: a production core, and the simulated groups that it owns.

Manta is one engine with all groups; a deployment of independent engines behind a router is one engine for each group, with
its own queue and its own index. Imports the core and `groups`; told what time it is.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from cluster.replay.groups import SimulatedGroup
from cluster.replay.time_model import TimeModel
from kvcache.ids import GroupId
from scheduler.config import CoreConfig
from scheduler.core import SchedulerCore
from scheduler.messages import Deltas, Report, Request
from scheduler.sampling import SamplingParams
from workers.batch import ResidentBatch


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """groups, each with a pool of `pages` pages of `page_size` tokens, `rows` sequences and `step_tokens` tokens a step."""

    groups: int = 8
    pages: int = 8000
    page_size: int = 256
    rows: int = 256
    step_tokens: int = 2048
    time: TimeModel = field(default_factory=TimeModel)

    def __post_init__(self) -> None:
        for name in ("groups", "pages", "rows", "step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.page_size < 16 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two from 16 up, not {self.page_size}")

    def pooled(self, pages: int) -> "ClusterShape":
        """One group with the compute of all, and `pages` pages."""
        return ClusterShape(
            1, pages, self.page_size, min(self.rows * self.groups, 1 << 15), self.step_tokens * self.groups,
            self.time.times(self.groups),
        )  # fmt: skip


class Engine:
    """schedule: called with (engine, group, when) for every run of steps that begins or is cut short.
    hear: called with what the front end is told, and whether some of it may be first tokens: then it is of one step.

    core_s: CPU time inside the core, as in the scheduler actor: the call, the groups' logs and the outbox. By the thread's own
    clock, since others may use the machine too; to read it costs about 1.5 us a call, which is in it.
    """

    def __init__(
        self,
        groups: Iterable[int],
        shape: ClusterShape,
        seed: int,
        schedule: Callable[["Engine", GroupId, float], None],
        hear: Callable[[Deltas, bool], None],
        *,
        wait_for_prefix: bool,
    ) -> None:
        self.core = SchedulerCore(CoreConfig(page_size=shape.page_size, wait_for_prefix=wait_for_prefix, seed=seed))
        self.core_s = 0.0
        self.groups: dict[GroupId, SimulatedGroup] = {}
        self.computed = {GroupId(group): 0 for group in groups}  # prompt tokens, by former epochs of each group
        self._shape = shape
        self._schedule = schedule
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
        self._call(partial(self.core.submit, 0, request), now_s)

    def run_ended(self, group: GroupId, now_s: float) -> None:
        simulated = self.groups[group]
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
        self._call(partial(self.core.group_down, group, "its workers died in the replay", returning=True), now_s)

    def forget_all(self, now_s: float) -> None:
        """The router sends elsewhere what it had sent here."""
        self._call(partial(self.core.front_end_down, 0), now_s)

    def bring_up(self, group: GroupId, now_s: float) -> None:
        """Workers are ready, with empty pools."""
        shape, epoch = self._shape, self._epochs[group]
        self._epochs[group] += 1
        model_len = min(self.core.config.max_model_len, shape.pages * shape.page_size + shape.page_size)
        batch = ResidentBatch(shape.rows, shape.page_size, shape.step_tokens, model_len)
        self.groups[group] = SimulatedGroup(epoch, batch, shape.time, self.core.config.grant_ahead)
        self._call(partial(self.core.group_up, group, epoch, shape.pages, shape.rows), now_s)

    # ---- the shell

    def _report(self, group: GroupId, report: Report, now_s: float) -> None:
        self._call(partial(self.core.report, group, report), now_s, first_tokens=report.steps == 1)

    def _call(self, change: Callable[[], None], now_s: float, *, first_tokens: bool = False) -> None:
        """One call into the core, and delivery of what follows, as `SchedulerServer` does it."""
        core = self.core
        core.now_s = now_s
        began_s = time.thread_time()
        try:
            change()
        finally:
            logs = core.take_logs()
            told = core.outbox.drain()
            self.core_s += time.thread_time() - began_s
        for name, log in logs:
            simulated = self.groups[name]
            simulated.take(log.commands, now_s)
            if simulated.run is None:
                self._begin(name, now_s)
            else:
                self._schedule(self, name, simulated.run.end_s)
        for _, deltas in told:
            self._hear(deltas, first_tokens)

    def _begin(self, group: GroupId, now_s: float) -> None:
        simulated = self.groups[group]
        simulated.begin(now_s)
        if simulated.run is not None:
            self._schedule(self, group, simulated.run.end_s)


def as_request(number: int, tokens: npt.NDArray[np.int32], hashes: list[int], output: int, priority: int) -> Request:
    """As a front end would send it; it ends after exactly `output` tokens, since the simulated group knows no stop id."""
    encoded = np.array(hashes, np.uint64).tobytes()
    return Request(number, tokens.tobytes(), encoded, SamplingParams(max_tokens=output), priority=priority)
