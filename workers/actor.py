"""The Ray shell of one rank. An error ends the actor's call, which is how the cluster hears of it.

Imports ray; the tensor side (`life`) only in the actor's own process, so that whoever places workers does not wait for torch.
"""

from typing import TYPE_CHECKING

import ray

from scheduler.logs import configure
from workers.config import ResolvedWorker, SchedulerAddress, WorkerConfig

if TYPE_CHECKING:
    from workers.life import Rendezvous


class WorkerActor:
    """Wrapped by `ray.remote` where it is placed (`cluster.fleet.group`), with the group's resources, never restarted or
    retried: a rank that dies takes its group's epoch with it. Two calls may run at once: the long one and one of the others."""

    def __init__(
        self,
        config: WorkerConfig,
        resolved: ResolvedWorker,
        group: int,
        epoch: int,
        rank: int,
        timeout_s: float,
        log_format: str,
    ) -> None:
        def entered(epoch: int) -> None:
            configure(log_format, group=group, epoch=epoch, rank=rank)

        entered(epoch)
        from workers.life import RankLife

        self._life = RankLife(config, resolved, group, epoch, rank, timeout_s, ray.util.get_node_ip_address(), entered)

    def open(self) -> "Rendezvous":
        """Rank 0 only: opens the ports at which its peers meet it."""
        return self._life.open()

    def build(self, rendezvous: "Rendezvous") -> int:
        """Joins the group, loads the weights and allocates the pool; returns its blocks. All ranks at the same time."""
        return self._life.build(rendezvous)

    def phase(self) -> tuple[str, int, int]:
        """What `build` is doing: its name, how much is done, how much there is. May be asked while it works."""
        return self._life.phase

    def run(self, scheduler: SchedulerAddress) -> str:
        """The step loop, until a scheduler closes the group's log; returns its reason. A rank that nobody wants any more ends
        its process by itself: whoever would do that has gone."""
        from workers.life import ABANDONED

        reason = self._life.run(scheduler)
        if reason == ABANDONED:
            ray.actor.exit_actor()
        return reason

    def rejoin(self, scheduler: SchedulerAddress, epoch: int) -> None:
        """Rank 0 only, while it runs: the group goes on as it is for this scheduler, as this epoch. Returns once it has greeted
        it. Errors: ConnectionError if it could not."""
        from workers.loop.terms import Term

        self._life.terms.call(Term(scheduler, epoch))

    def hold_on(self) -> None:
        """Rank 0 only: if its scheduler has gone, there will be another."""
        self._life.terms.hold_on()
