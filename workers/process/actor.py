"""The Ray shell of one rank. An error ends the actor's call, which is how the cluster hears of it.

Imports ray; the tensor side (`life`) only in the actor's own process, so that whoever places workers does not wait for torch.
"""

import logging
import os
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, NamedTuple

import ray
from ray.util.placement_group import get_current_placement_group, remove_placement_group

from scheduler.logs import configure
from scheduler.protocol.orphans import Estate, OwnerWatch
from workers.config import ResolvedWorker, SchedulerAddress, WorkerConfig

if TYPE_CHECKING:
    from workers.process.life import Rendezvous

logger = logging.getLogger(__name__)


REMOVAL_S = 10.0
"""For Ray to end this process with its placement group, before it ends itself."""

CALLS = 12
"""That may run at once: the long one, `phase`, `rejoin`, `handover`, `busy`, `told`, `hold_on`, `keep` and `ended`; likewise
those of an owner that was cut off."""


class GroupHandover(NamedTuple):
    """What whoever takes over a group without its scheduler must know. token: the next scheduler's as well, since ranks know
    each other by it; "" while the group comes up, and has met none."""

    epoch: int
    token: str


class WorkerActor:
    """Wrapped by `ray.remote` where it is placed (`cluster.fleet.group`), with the group's resources, never restarted or
    retried: a rank that dies takes its group's epoch with it. estate: what it belongs to if it outlives whoever started it.
    `CALLS` may run at once."""

    def __init__(
        self,
        config: WorkerConfig,
        resolved: ResolvedWorker,
        group: int,
        epoch: int,
        rank: int,
        timeout_s: float,
        log_format: str,
        estate: Estate | None = None,
    ) -> None:
        def entered(epoch: int) -> None:
            configure(log_format, group=group, epoch=epoch, rank=rank)

        entered(epoch)
        from workers.process.life import RankLife

        self._resolved = resolved
        self._end: Future[str] = Future()
        self._token = ""
        self._placement = get_current_placement_group()
        self._owner = OwnerWatch(estate.adoption_timeout_s, self._orphaned) if estate is not None else None
        served = self._owner.heard if self._owner is not None else lambda: None
        host = ray.util.get_node_ip_address()
        self._life = RankLife(config, resolved, group, epoch, rank, timeout_s, host, entered, served)

    def open(self) -> "Rendezvous":
        """Rank 0 only: opens the ports at which its peers meet it."""
        return self._life.open()

    def fetch(self) -> float:
        """Brings what is missing of the checkpoint to this node; returns the seconds that it took."""
        return self._life.fetch()

    def build(self, rendezvous: "Rendezvous") -> int:
        """Joins the group, loads the weights and allocates the pool; returns its blocks. All ranks at the same time."""
        return self._life.build(rendezvous)

    def phase(self) -> tuple[str, int, int]:
        """What `fetch` or `build` is doing: its name, how much is done, how much there is. May be asked while it works."""
        return self._life.phase

    def run(self, scheduler: SchedulerAddress) -> str:
        """The step loop, until a scheduler closes the group's log; returns its reason. A rank that nobody wants any more ends
        its process by itself: whoever would do that has gone, unless its owner is watched for."""
        from workers.process.life import ABANDONED

        if self._token:
            raise RuntimeError("its loop runs already: another owner has taken the group over")
        self._token = scheduler.token
        try:
            reason = self._life.run(scheduler)
        except BaseException as error:
            self._end.set_exception(error)
            raise
        self._end.set_result(reason)
        if reason == ABANDONED and self._owner is None:
            ray.actor.exit_actor()
        return reason

    def rejoin(self, scheduler: SchedulerAddress, epoch: int) -> None:
        """Rank 0 only, while it runs: the group goes on as it is for this scheduler, as this epoch. Returns once it has greeted
        it. Errors: ConnectionError if it could not."""
        from workers.loop.terms import Term

        self._life.terms.call(Term(scheduler, epoch))

    def busy(self) -> tuple[float, float]:
        """Seconds in the present step, and how many it may take."""
        return self._life.busy()

    def handover(self) -> GroupHandover | None:
        """Rank 0 only. None: its loop has ended."""
        return None if self._end.done() else GroupHandover(self._life.epoch, self._token)

    def hold_on(self) -> None:
        """Rank 0 only: if its scheduler has gone, there will be another."""
        self._life.terms.hold_on()

    def ended(self, timeout_s: float) -> str | None:
        """For whoever has not called `run` himself: waits for its end. What it has returned or raised; None while it runs."""
        wait([self._end], timeout_s)
        return self._end.result() if self._end.done() else None

    def told(self) -> ResolvedWorker:
        """What was settled when its group began."""
        return self._resolved

    def keep(self) -> None:
        """An owner lives."""
        if self._owner is not None:
            self._owner.heard()

    def _orphaned(self) -> None:
        """Ends the whole group, ranks that do not react included, and frees its place."""
        logger.error("nobody has taken this group over: it ends")
        try:
            if self._placement is not None:
                remove_placement_group(self._placement)
        except Exception:  # Ray does not answer: its place is free once all of its ranks have ended by themselves
            logger.exception("the group's place could not be given back")
        time.sleep(REMOVAL_S)
        os._exit(1)
