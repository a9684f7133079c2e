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
    retried: a rank that dies takes its group's epoch with it. Two calls may run at once: the long one, and `phase`."""

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
        configure(log_format, group=group, epoch=epoch, rank=rank)
        from workers.life import RankLife

        self._life = RankLife(config, resolved, group, epoch, rank, timeout_s, ray.util.get_node_ip_address())

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
        """The step loop, until the scheduler closes the group's log; returns its reason."""
        return self._life.run(scheduler)
