"""Two versions of a model side by side: the groups of the old one run empty, one after the other, and make room for the new.

Each version has a scheduler, groups and front ends of its own, so no sequence and no block ever passes from one to the other.
Imports ray, `ownership` and `fleet`.
"""

import contextlib
import logging
import threading
import time

import ray

from cluster.engine import EngineError
from cluster.fleet.fleet import Fleet
from cluster.fleet.ownership.remains import actor_of, answer_of, end, find
from scheduler.protocol.orphans import Estate

logger = logging.getLogger(__name__)

LOOK_S = 0.5
ROOM_S = 5.0
"""That a new group waits for a place before an old one has to make room: Ray finds one that is free at once."""

RETURN_S = 60.0
"""That the last old group, which is restarting while requests wait for it, may take before it has to make room."""

ASK_TIMEOUT_S = 10.0
JOIN_TIMEOUT_S = 10.0


def other_versions(estate: Estate) -> list[Fleet]:
    """What serves the same application in other versions, kept by this process from now on. What has no scheduler ends."""
    fleets = []
    for version, found in find(estate.namespace).items():
        if version == estate.version:
            continue
        latest_first = [name for _, name in sorted(found.schedulers.items(), reverse=True)]
        fleet = _resumed(Estate(estate.namespace, version, estate.adoption_timeout_s), latest_first)
        if fleet is None:
            end(estate.namespace, found)
        else:
            fleets.append(fleet)
    return fleets


def serves_another_version(estate: Estate) -> bool:
    """Whether a scheduler of another version is there: front ends of this one may take their time."""
    return any(found.schedulers for version, found in find(estate.namespace).items() if version != estate.version)


def _resumed(estate: Estate, schedulers: list[str]) -> Fleet | None:
    for name in schedulers:
        try:
            told = answer_of(actor_of(estate.namespace, name).told, ASK_TIMEOUT_S)
        except (ValueError, ray.exceptions.RayError):  # it has died, or does not answer
            continue
        fleet = Fleet(told.config, told.resolved, logger.error, told.bounds, told.log_format, estate)
        with contextlib.suppress(EngineError):
            if fleet.resume():
                return fleet
        fleet.close()
    return None


class Roll:
    """A thread that lets the old versions go while `new` comes up, and ends with the last of them.

    A group of an old version goes when a new group lacks room, or all new ones are up; the last one of a version when its last
    front end has gone, so that none of its requests fails. Only where there is no room for even one new group beside it, it
    goes before; one that is restarting comes back first, since those who wait for it would end.
    """

    def __init__(self, new: Fleet, old: list[Fleet]) -> None:
        self.old = old
        self._new = new
        self._lacking_since_s: float | None = None
        self._down_since_s: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-roll", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the old versions at once."""
        self._closing.set()
        for fleet in self.old:
            fleet.stop()
        self._thread.join(timeout=JOIN_TIMEOUT_S)
        for fleet in self.old:
            fleet.close()

    def _run(self) -> None:
        while self.old and not self._closing.wait(LOOK_S):
            oldest = self.old[0]
            try:
                self._step(oldest)
            except EngineError as error:  # a scheduler is being replaced
                logger.warning("the roll skips a turn: %s", error)
            except Exception:  # whatever it is: without this thread the old version stays
                logger.exception("the roll skips a turn")
            if not oldest.target and not self._closing.is_set():
                logger.warning("version %s has gone", oldest.version)
                self.old.remove(oldest)
                oldest.close()

    def _step(self, old: Fleet) -> None:
        up = sum(group.up for group in self._new.groups())
        lacking = self._lacks_room()
        if not lacking and up < self._new.wanted:
            return  # new groups are loading
        groups, last = old.groups(), old.target == 1
        if not groups or (last and old.status().front_ends and (up or not lacking)):
            return  # its scheduler does not answer, or serves on
        leaving = min(groups, key=lambda group: (group.up, -group.group))
        if last and self._comes_back(old, leaving.up):
            return
        if leaving.up:
            old.remove_group(leaving.group, last=last)
        else:
            old.give_up(leaving.group)

    def _comes_back(self, old: Fleet, up: bool) -> bool:
        """Whether the last group of an old version, which front ends use, has a place and will be up soon."""
        now_s = time.monotonic()
        if up or old.waits_for_room or not old.status().front_ends:
            self._down_since_s = None
            return False
        self._down_since_s = self._down_since_s or now_s
        return now_s - self._down_since_s < RETURN_S

    def _lacks_room(self) -> bool:
        """Whether a new group has waited long enough for a place to be sure that there is none."""
        now_s = time.monotonic()
        if not self._new.waits_for_room:
            self._lacking_since_s = None
        elif self._lacking_since_s is None:
            self._lacking_since_s = now_s
        return self._lacking_since_s is not None and now_s - self._lacking_since_s > ROOM_S
