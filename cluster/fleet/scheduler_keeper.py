"""Keeps the one scheduler up: starts its actor, hears of its death, and starts another with an empty table.

Imports ray and the scheduler's actor shell. Groups go on for the new one, and tell it what their pools hold (`health`).
"""

import contextlib
import logging
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.engine import EngineError
from cluster.fleet.ownership.owner import Owner
from cluster.fleet.ownership.remains import answer_of
from scheduler.config.core import CoreConfig, QueueBounds, Resolved
from scheduler.protocol.silence import Silence
from scheduler.server.actor import Handover, SchedulerActor
from scheduler.server.stats import ClusterStatus
from scheduler.server.vitals import Fenced
from workers.config import SchedulerAddress

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0
STATUS_TIMEOUT_S = 5.0
ADOPT_TIMEOUT_S = 10.0
POLL_S = 0.25
RESTART_PAUSE_S = 1.0
HUNG_TIMES = 2.5
"""Of `hung_after_s`, for which a scheduler may say nothing. All that runs pauses where it is replaced, so it is given some time
to come back."""


@dataclass(frozen=True, slots=True)
class LiveScheduler:
    """One life of the scheduler. epoch: counts lives from 0."""

    actor: Any
    address: SchedulerAddress
    epoch: int


class SchedulerKeeper:
    """What the scheduler knows dies with it. Another comes up by itself, to which groups and front ends tell what they have.

    Errors: EngineError from every call once `close` was called; also, but for `expect`, if there is no scheduler for
    `CALL_TIMEOUT_S`.
    """

    def __init__(
        self,
        config: CoreConfig,
        resolved: Resolved,
        bounds: QueueBounds | None,
        log_format: str,
        owner: Owner | None = None,
    ) -> None:
        """owner: where the scheduler is to outlive this process."""
        self._token = secrets.token_hex(16)
        self._told = (config, resolved, bounds)
        self._hung_after_s = config.hung_after_s
        self._log_format = log_format
        self._owner = owner
        self._changed = threading.Condition()
        self._live: LiveScheduler | None = None
        self._last_epoch = -1
        self._announced: set[int] = set()
        self._resting: dict[int, tuple[str, float]] = {}
        """Why each was lost that is tried again later, and when that is."""
        self._fenced: dict[int, Fenced] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="manta-scheduler-keeper", daemon=True)

    def start(self, timeout_s: float, life: int = 0) -> LiveScheduler:
        """life: the number of its first. Errors: EngineError if it does not come up in time, or at all."""
        live = self._launch(life, timeout_s)
        self._set(live)
        self._thread.start()
        return live

    def adopt(self, actor: Any, life: int) -> Handover | None:
        """Takes over the scheduler that another has left, instead of `start`. None if it does not answer, or never listened."""
        try:
            handover: Handover | None = answer_of(actor.handover, ADOPT_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        if handover is None:
            return None
        self._token = handover.token
        if self._owner is not None:
            self._owner.keep(actor)
        self._set(LiveScheduler(actor, SchedulerAddress(handover.host, handover.port, handover.token), life))
        self._thread.start()
        return handover

    def trust(self, token: str) -> None:
        """Before `start`: groups are there already, which know each other by it."""
        self._token = token

    def current(self, timeout_s: float | None = CALL_TIMEOUT_S) -> LiveScheduler:
        """The scheduler that is up, as far as is known; waits while it is being replaced. timeout_s: None, however long."""
        with self._changed:
            self._changed.wait_for(lambda: self._live is not None or self._closing.is_set(), timeout=timeout_s)
            if self._live is None or self._closing.is_set():
                raise EngineError("the scheduler has gone")
            return self._live

    def announce(self, group: int) -> None:
        """A group will come up: every scheduler knows of it before it hears of any request, which wait for it."""
        self._announced.add(group)
        self._resting.pop(group, None)

    def lose(self, group: int, reason: str) -> None:
        """The group will not come back. Errors: EngineError if the scheduler does not answer."""
        self._announced.discard(group)
        self._resting.pop(group, None)
        self.call("group_lost", group, reason)

    def rest(self, group: int, reason: str, back_s: float) -> None:
        """The group is not expected before it is tried again, in `back_s`. Every scheduler knows of it until then: one that
        does not hear of it now goes on to expect it, or is replaced."""
        self._announced.discard(group)
        self._resting[group] = (reason, time.monotonic() + back_s)
        with contextlib.suppress(EngineError):
            self.call("group_lost", group, reason, back_s)

    def fenced(self, group: int, epoch: int) -> Fenced | None:
        """Why the scheduler does not listen to this epoch of the group any more; None while it does, as far as is known."""
        fenced = self._fenced.get(group)
        return fenced if fenced is not None and fenced.epoch == epoch else None

    def expect(self, group: int) -> LiveScheduler:
        """Tells the scheduler that a group is being started. Returns the life of it that has heard, hence one that was up
        after this call: whoever has seen the scheduler die gets the next one, however long that takes to come.
        Errors: EngineError once `close` was called."""
        self.announce(group)
        while True:
            self._check()
            live = self.current(timeout_s=None)
            try:
                ray.get(live.actor.expect.remote(group), timeout=CALL_TIMEOUT_S)
                return live
            except ray.exceptions.RayError as error:
                logger.warning("group %d waits for a scheduler: that of epoch %d does not answer: %s", group, live.epoch, error)
                self._pause(live)

    @property
    def up(self) -> bool:
        """As far as is known."""
        return self._live is not None

    @property
    def epoch(self) -> int:
        """Of the scheduler that is up, or was last; -1 before the first."""
        return self._last_epoch

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls the actor's method and waits. Errors: EngineError if it does not answer."""
        self._check()
        try:
            return ray.get(getattr(self.current().actor, method).remote(*arguments), timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise EngineError(f"the scheduler does not answer: {error}") from error

    def status(self, maps: bool) -> ClusterStatus | None:
        """What the scheduler says of itself; None, soon, while there is none."""
        live = self._live
        if live is None:
            return None
        try:
            status: ClusterStatus = ray.get(live.actor.status.remote(maps), timeout=STATUS_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        return status

    def close(self) -> None:
        """Ends every group's log, then the scheduler. A second call does nothing."""
        if self._closing.is_set():
            return
        live = self._live
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if live is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(live.actor.close.remote(), timeout=5.0)
        if self._thread.is_alive():
            self._thread.join(timeout=CALL_TIMEOUT_S)
        for last in {live, self._live}:  # the thread may have started another meanwhile
            with contextlib.suppress(Exception):  # Ray itself may have gone
                if last is not None:
                    ray.kill(last.actor)

    def _launch(self, epoch: int, timeout_s: float) -> LiveScheduler:
        # Beside its keeper: without a resource of its own Ray would put it on any node, a worker's that may go among them.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        lasting = self._owner.scheduler_options(epoch) if self._owner is not None else {}
        options = ray.remote(SchedulerActor).options(
            num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here, **lasting
        )
        estate = self._owner.estate if self._owner is not None else None
        actor = options.remote(*self._told, self._token, self._log_format, estate)
        if self._owner is not None:
            self._owner.keep(actor)
        try:
            return LiveScheduler(actor, self._listening(actor, timeout_s), epoch)
        except BaseException:  # also where only the connection to it was cut: it has the name that the next one is to have
            self._end(actor)
            raise

    def _listening(self, actor: Any, timeout_s: float) -> SchedulerAddress:
        """It knows whom requests wait for before it listens. Errors: EngineError."""
        try:
            told = [actor.expect.remote(group) for group in sorted(self._announced)]
            for group, (reason, back_at_s) in sorted(self._resting.items()):
                told.append(actor.group_lost.remote(group, reason, max(0.0, back_at_s - time.monotonic())))
            ray.get(told, timeout=timeout_s)
            host, port = ray.get(actor.listen.remote(), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise EngineError(
                f"the scheduler's process was not ready within {timeout_s:g} s: "
                "raise start_timeout_s if its machine is only slow"
            ) from error
        except ray.exceptions.RayError as error:
            raise EngineError(f"the scheduler's process died while it started: {error}") from error
        return SchedulerAddress(host, port, self._token)

    def _pause(self, live: LiveScheduler) -> None:
        """Until another is known to be up, or that none is; not for long."""
        with self._changed:
            self._changed.wait_for(lambda: self._live is not live or self._closing.is_set(), timeout=RESTART_PAUSE_S)

    def _set(self, live: LiveScheduler | None) -> None:
        with self._changed:
            self._live = live
            if live is not None:
                self._last_epoch = live.epoch
            self._changed.notify_all()

    def _watch(self) -> None:
        """One life after the other."""
        while not self._closing.is_set() and (live := self._live) is not None:
            try:
                reason = self._attend(live)
            except Exception:  # whatever it is: without this thread its death is noticed by nobody
                logger.exception("the scheduler could not be looked after; trying on")
                self._closing.wait(RESTART_PAUSE_S)
                continue
            self._check()
            if not self._closing.is_set():
                logger.error("the scheduler %s; starting another", reason)
                self._set(None)
                self._end(live.actor)
                self._replace(live.epoch + 1)

    def _check(self) -> None:
        if self._owner is not None:
            self._owner.check()

    def _end(self, actor: Any) -> None:
        """Front ends must not stay with one that has no groups any more, should it live after all."""
        if self._owner is not None:
            self._owner.release(actor)
        with contextlib.suppress(Exception):  # it is dead
            ray.kill(actor)

    def _attend(self, live: LiveScheduler) -> str:
        """Until the scheduler dies, hangs or is closed; which of these. Hears from it whom it has fenced."""
        end, silence, asked = live.actor.closed.remote(), Silence(time.monotonic(), POLL_S), None
        silence.heard(live.epoch, time.monotonic())
        while not self._closing.wait(POLL_S):
            asked = asked or live.actor.beat.remote()
            done, _ = ray.wait([end, asked], num_returns=2, timeout=0)
            if end in done:
                if _has_ended(end):
                    return "has died"
                logger.warning("the connection to the scheduler was cut: it is asked anew")
                end = live.actor.closed.remote()
            if asked in done:
                with contextlib.suppress(ray.exceptions.RayError):
                    self._fenced |= {fenced.group: fenced for fenced in ray.get(asked)}
                    silence.heard(live.epoch, time.monotonic())
                asked = None
            if silence.look(time.monotonic())[live.epoch] > (hung_s := HUNG_TIMES * self._hung_after_s):
                return f"has said nothing for {hung_s:g} s"
        return "was closed"

    def _replace(self, epoch: int) -> None:
        while not self._closing.is_set():
            self._check()
            try:
                self._set(self._launch(epoch, CALL_TIMEOUT_S))
                return
            except Exception:  # whatever it is: without this thread there will be no scheduler any more
                logger.exception("the scheduler could not be started again; trying on")
                time.sleep(RESTART_PAUSE_S)


def _has_ended(end: Any) -> bool:
    """Whether an actor that was waited for has died; otherwise the connection to it was cut, and it may live."""
    try:
        ray.get(end)
    except ray.exceptions.ActorUnavailableError:
        return False
    except ray.exceptions.RayError:
        pass
    return True
