"""Carries out how many groups there should be: asks the pure policy once a second, adds and drains groups of a fleet.

Imports `fleet` and the scheduler's `scaling`. Nodes are Ray's business: an added group waits as a pending placement group.
"""

import logging
import threading
import time

from cluster.engine import EngineError
from cluster.fleet.fleet import Fleet
from scheduler.server.scaling import Scaler, ScalingDecision

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
JOIN_TIMEOUT_S = 10.0


class Autoscaler:
    """One thread beside a fleet. Every decision but "none" is logged with its reason, also in a dry run."""

    def __init__(self, fleet: Fleet, max_groups: int) -> None:
        self._fleet = fleet
        self._scaler = Scaler(fleet.config, fleet.wanted, max_groups)
        self._draining: threading.Thread | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-autoscaler", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, fleet: Fleet) -> "Autoscaler | None":
        """As the fleet's configuration says; None where the number of groups is fixed."""
        most = fleet.config.max_groups
        return None if most is None else cls(fleet, most)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            try:
                self._step()
            except EngineError as error:  # the scheduler is being replaced, or the fleet is closing
                logger.warning("the autoscaler skips a turn: %s", error)
            except Exception:  # whatever it is: without this thread the number of groups stays
                logger.exception("the autoscaler skips a turn")

    def _step(self) -> None:
        status = self._fleet.status()
        if status.engine is None:
            return
        self._scaler.min_groups = self._fleet.wanted
        draining = sum(group.draining for group in status.engine.groups)
        target = self._fleet.target - draining
        starting = target - sum(group.up and not group.draining for group in status.engine.groups)
        decision = self._scaler.decide(time.monotonic(), status.engine, target, max(0, starting))
        if decision.action != "none":
            dry = " (dry run)" if self._scaler.config.scale_dry_run else ""
            logger.warning("autoscaler: %s%s: %s", decision.action, dry, decision.reason)
            if not self._scaler.config.scale_dry_run:
                self._act(decision)

    def _act(self, decision: ScalingDecision) -> None:
        if decision.action == "add":
            self._fleet.add_group()
        elif decision.group is not None and (self._draining is None or not self._draining.is_alive()):
            self._draining = threading.Thread(target=self._remove, args=(decision.group,), daemon=True)
            self._draining.start()

    def _remove(self, group: int) -> None:
        """In a thread of its own: a group runs empty in its own time."""
        try:
            gone = self._fleet.remove_group(group)
            logger.warning("autoscaler: group %d %s", group, "is gone" if gone else "is needed and stays")
        except EngineError as error:
            logger.warning("autoscaler: group %d could not be drained: %s", group, error)
