"""One epoch of one tensor-parallel group on Ray: its placement group and its rank actors, started and ended together.

Imports ray and the workers' actor shell. The only file that creates workers.
"""

import logging
import time
from functools import partial
from typing import Any

import ray
from ray._common.utils import RESOURCE_CONSTRAINT_PREFIX
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.engine import EngineError
from cluster.fleet.ownership.lasting import Lasting
from cluster.fleet.ownership.remains import Remains, actor_of
from scheduler.server.stats import GroupStart
from workers.config import ResolvedWorker, SchedulerAddress, WorkerConfig
from workers.process.actor import CALLS, WorkerActor

logger = logging.getLogger(__name__)

LATE = "a worker was not ready in time: raise start_timeout_s"
PHASE_POLL_S = 0.25
PLACEMENT_POLL_S = 1.0
ENDED_S = 30.0
"""That a rank of which another has set the loop running is asked at a time whether it has ended."""
ANSWER_S = 5.0
KIND_SHARE = 0.001
"""Of the one that every node with GPUs has of the resource that names their kind: as many as Ray itself asks for."""


class GroupHandle:
    """Starts in steps, so that several groups come up side by side, the first of them beside the scheduler: place, build, run;
    `kill` ends it at any point.

    A rank is never restarted: its epoch ends with it, and a replacement is a new handle with the next epoch. epoch: the ranks'
    present one. lasting: where the group is to outlive this process; else its end is the group's.
    """

    def __init__(
        self,
        group: int,
        epoch: int,
        config: WorkerConfig,
        resolved: ResolvedWorker,
        log_format: str,
        lasting: Lasting | None = None,
    ) -> None:
        self.group = group
        self.epoch = epoch
        self.size = config.tensor_parallel_size
        self.resources = rank_resources(config, resolved)
        self._config, self._resolved = config, resolved
        self._log_format = log_format
        self._lasting = lasting
        self._placement: PlacementGroup | None = None
        self._ranks: list[Any] = []
        self._killed = False
        self.placed = False
        """Whether there is room for it."""
        self.adopted = False
        """It ran already when it came into these hands."""
        self.waits = False
        """It has been adopted, and has no scheduler."""
        self._silent = False
        """It has been adopted, and nobody knows yet whether its loops run."""
        self.runs: list[Any] = []
        self.phase = GroupStart(group, "placing")

    def start(self, scheduler: SchedulerAddress, deadline: float) -> None:
        """Places the ranks, builds them, and sets their loops running; returns when the pools stand.

        deadline: by `time.monotonic`; downloads are not counted. Errors: what a rank raised; EngineError when the time is over;
        `kill` is the caller's.
        """
        if self._silent and self._runs_already(scheduler, deadline):
            self.rejoin(scheduler, deadline)
            return
        builds, deadline = self.begin(deadline)
        self._await_all(builds, deadline)
        self._check()
        self.runs = [rank.run.remote(scheduler) for rank in self._ranks]

    def begin(self, deadline: float) -> tuple[list[Any], float]:
        """As `start`, as far as it goes without a scheduler; does not wait for the ranks to be built. Whoever takes the group
        over meanwhile goes on from there. Returns the ranks' builds, and the deadline without downloads. Errors: as `start`."""
        self.place(deadline)
        deadline += self._fetch(_left(deadline))
        rendezvous = _get(self._ranks[0].open.remote(), deadline)
        return [rank.build.remote(rendezvous) for rank in self._ranks], deadline

    def place(self, deadline: float) -> None:
        """Finds room and starts the ranks' processes, which takes no scheduler; does nothing if they were started. Errors: as
        `start`."""
        if self._ranks:
            return
        self._check()
        lasting = self._lasting.placement_options(self.group, self.epoch) if self._lasting is not None else {}
        self._placement = placement_group([self.resources] * self.size, strategy="STRICT_PACK", **lasting)
        while not self._placement.wait(timeout_seconds=min(_left(deadline), PLACEMENT_POLL_S)):
            if self._killed:
                raise EngineError(f"group {self.group} is not wanted any more")
            if time.monotonic() < deadline:
                continue
            raise EngineError(
                f"group {self.group} found no node with {self.size} x {self.resources} free in time: free some, add a node, "
                "lower tensor_parallel_size or groups, or raise start_timeout_s"
            )
        self.placed = True
        actor = ray.remote(WorkerActor)
        for rank in range(self.size):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            options = actor.options(
                num_cpus=self.resources.get("CPU", 0),
                num_gpus=self.resources.get("GPU", 0),
                max_restarts=0,
                max_concurrency=CALLS,
                max_task_retries=0,
                scheduling_strategy=strategy,
                **(self._lasting.rank_options(self.group, self.epoch, rank) if self._lasting is not None else {}),
            )
            told = (self._config, self._resolved, self.group, self.epoch, rank, _left(deadline), self._log_format)
            self._ranks.append(options.remote(*told, self._lasting.estate if self._lasting is not None else None))
            if self._lasting is not None:
                self._lasting.keep(self._ranks[-1])

    def adopt(self, remains: Remains, *, waits: bool = False) -> None:
        """Takes over a group whose loops run, instead of `start`. waits: for a scheduler. Errors: ValueError if a rank of it
        has died."""
        self.adopt_begun(remains)
        self.adopted, self.waits = True, waits
        self.runs = [rank.ended.remote(ENDED_S) for rank in self._ranks]

    def adopt_begun(self, remains: Remains) -> None:
        """Takes over a group that comes up, instead of `place`: `start` does the rest. Errors: as `adopt`."""
        assert self._lasting is not None, "only what is owned outlives its owner"
        if sorted(remains.ranks) != [*range(self.size)]:
            raise ValueError(f"group {self.group} has ranks {sorted(remains.ranks)} of {self.size}")
        self._placement = remains.placement
        self._ranks = [actor_of(self._lasting.estate.namespace, name) for _, name in sorted(remains.ranks.items())]
        for rank in self._ranks:
            self._lasting.keep(rank)
        self.placed = True

    def adopt_silent(self, remains: Remains) -> None:
        """Takes over a group whose leader does not answer for now: `start` asks it, and does whatever is left to do. Errors: as
        `adopt`."""
        self.adopt_begun(remains)
        self._silent = True

    def rejoin(self, scheduler: SchedulerAddress, deadline: float) -> None:
        """The ranks go on as they are for another scheduler, as the next epoch; returns once their leader has greeted it.

        Errors: ConnectionError if that scheduler or the group has gone; EngineError when time is over, or for a dead worker.
        """
        if not self._ranks:
            raise EngineError(f"group {self.group} is not wanted any more")
        self._check()
        self.epoch += 1
        _get(self._ranks[0].rejoin.remote(scheduler, self.epoch), deadline)

    def steps(self) -> bool:
        """Whether its leader is in a step that may take longer yet: a first one of its kind, that compiles."""
        try:
            busy_s, patience_s = _get(self._ranks[0].busy.remote(), time.monotonic() + ANSWER_S)
        except Exception:
            return False
        return bool(busy_s < patience_s)

    def hold_on(self) -> None:
        """Says to a leader without a scheduler that there will be another. Does not wait."""
        for leader in self._ranks[:1]:
            leader.hold_on.remote()

    def wait(self, timeout_s: float) -> str | None:
        """Waits for the group to end; why it did, or None if it still runs."""
        done, _ = ray.wait(self.runs, num_returns=1, timeout=timeout_s)
        return self._reason(self.runs.index(done[0])) if done else None

    def kill(self) -> None:
        """Fences the epoch: every rank is gone for good, its resources are free, also those it still waits for. Never raises:
        what Ray cannot end now it ends with this process, and the scheduler listens to no older epoch."""
        self._killed = True
        self._check()
        ranks, self._ranks = self._ranks, []
        placement, self._placement = self._placement, None
        ends = [partial(ray.kill, rank, no_restart=True) for rank in ranks]
        if placement is not None:
            ends.append(partial(remove_placement_group, placement))
        for end in ends:
            try:
                end()
            except Exception:
                logger.exception("group %d, epoch %d could not be ended", self.group, self.epoch)

    def _check(self) -> None:
        if self._lasting is not None:
            self._lasting.check()

    def _runs_already(self, scheduler: SchedulerAddress, deadline: float) -> bool:
        """Of one that has not answered before. Errors: as `start`; EngineError for one whose ranks have another secret."""
        said = _get(self._ranks[0].handover.remote(), deadline)
        if said is None:
            raise EngineError(f"group {self.group} ended while nobody kept it")
        if said.token not in ("", scheduler.token):
            raise EngineError(f"group {self.group} has another secret than the scheduler that was started meanwhile")
        self.epoch, self._silent = max(self.epoch, said.epoch), False
        if said.token:
            self.runs = [rank.ended.remote(ENDED_S) for rank in self._ranks]
        return bool(said.token)

    def _fetch(self, patience_s: float) -> float:
        """The node gets what it lacks of the checkpoint; returns the seconds that it took: as many as it takes, while it goes
        on. Errors: EngineError when nothing has come for `patience_s`."""
        pending, took_s = [rank.fetch.remote() for rank in self._ranks], 0.0
        moved_s = time.monotonic()
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=PHASE_POLL_S)
            for reference in done:
                took_s = max(took_s, _get(reference, time.monotonic() + patience_s))
            now = GroupStart(self.group, *_get(self._ranks[0].phase.remote(), time.monotonic() + patience_s))
            if now != self.phase:
                self.phase, moved_s = now, time.monotonic()
            elif time.monotonic() - moved_s > patience_s:
                raise EngineError(
                    f"group {self.group}: nothing more of {self._config.model} has come to its node for {patience_s:.0f} s: "
                    "look at the network, or raise start_timeout_s"
                )
        return took_s

    def _await_all(self, references: list[Any], deadline: float) -> None:
        """All or the first error, without waiting for ranks that wait for the one that failed."""
        pending = references
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=PHASE_POLL_S)
            if done:
                _get(done[0], deadline)
            elif time.monotonic() > deadline:
                raise EngineError(f"group {self.group} was not ready in time: raise start_timeout_s")
            else:
                self.phase = GroupStart(self.group, *_get(self._ranks[0].phase.remote(), deadline))

    def _reason(self, rank: int) -> str | None:
        """Why its loop has ended; None if it runs on, and it was only asked."""
        try:
            reason = ray.get(self.runs[rank])
            if reason is not None:
                return f"group {self.group} ended: {reason}"
        except ray.exceptions.ActorUnavailableError:  # the connection to it was cut: it may live
            logger.warning("group %d, rank %d: the connection to it was cut; it is asked anew", self.group, rank)
        except ray.exceptions.RayTaskError as error:
            return f"group {self.group}, rank {rank} failed: {error.cause}"
        except ray.exceptions.RayError:
            return f"group {self.group}, rank {rank}: its worker process died"
        self.runs[rank] = self._ranks[rank].ended.remote(ENDED_S)
        return None


def rank_resources(config: WorkerConfig, resolved: ResolvedWorker) -> dict[str, float]:
    """What Ray must set aside for each rank: one GPU, of the kind asked for, or as many logical CPUs as it has threads."""
    if resolved.device != "cuda":
        return {"CPU": float(resolved.threads)}
    if config.accelerator_type is None:
        return {"GPU": 1.0, "CPU": 1.0}
    return {"GPU": 1.0, "CPU": 1.0, f"{RESOURCE_CONSTRAINT_PREFIX}{config.accelerator_type}": KIND_SHARE}


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def _get(reference: Any, deadline: float) -> Any:
    """A remote call's result, its own error unwrapped. Errors: EngineError for a dead worker or a missed deadline."""
    try:
        return ray.get(reference, timeout=_left(deadline))
    except ray.exceptions.GetTimeoutError as error:
        raise EngineError(LATE) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TimeoutError):  # it waited for another rank
            raise EngineError(f"{LATE} ({error.cause})") from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise EngineError(f"a worker process died while it started: {error}") from error
