"""Takes over what the owner of an estate has left when it died: its scheduler and its groups, as they run. Ends the rest.

Imports ray, `ownership`, `group` and `scheduler_keeper`. A `Fleet` keeps what it is handed from here on.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ray

from cluster.fleet.group import GroupHandle
from cluster.fleet.ownership.owner import Owner
from cluster.fleet.ownership.remains import (
    AGAIN_S,
    Found,
    Remains,
    actor_of,
    answer_of,
    end,
    end_group,
    find,
    latest_scheduler,
)
from cluster.fleet.scheduler_keeper import SchedulerKeeper
from scheduler.protocol.orphans import Estate
from scheduler.server.actor import Handover
from scheduler.server.stats import ClusterStatus, GroupStats
from workers.config import ResolvedWorker
from workers.process.actor import GroupHandover

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10.0
SILENT = GroupHandover(-1, "")
"""Of a leader that has not answered in that time: whoever keeps its group asks on."""

SECRET_TIMEOUT_S = 60.0
"""For one of the groups that have lost their scheduler to tell its secret, without which they would begin anew. Nobody is
served meanwhile either way."""

NewHandle = Callable[[int, int], GroupHandle]
"""Group and epoch -> a handle that has not been started."""


@dataclass(slots=True)
class Adopted:
    """next_life: of the scheduler, if none was there to be taken over; None: it lives. epochs: the next of each group.
    groups: those that run, also those that wait for a scheduler. begun: those that come up, and go on from where they are, and
    those of which that is not known yet.
    leaving: which of them were running empty. awaited: those that requests wait for, and nobody starts.
    """

    next_life: int | None = 0
    epochs: dict[int, int] = field(default_factory=dict)
    groups: list[GroupHandle] = field(default_factory=list)
    begun: list[GroupHandle] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    awaited: list[int] = field(default_factory=list)

    def keep(self, handle: GroupHandle) -> None:
        (self.groups if handle.adopted else self.begun).append(handle)
        self.epochs[handle.group] = max(self.epochs[handle.group], handle.epoch + 1)

    def has(self, group: int) -> bool:
        return any(handle.group == group for handle in (*self.groups, *self.begun))


def settled_for_scheduler(estate: Estate) -> ResolvedWorker | None:
    """What the scheduler of an estate was told; None if there is none, or it does not answer."""
    scheduler = latest_scheduler(estate.namespace, estate.version)
    with contextlib.suppress(ray.exceptions.RayError):
        if scheduler is not None:
            told: ResolvedWorker = answer_of(scheduler.told, ASK_TIMEOUT_S).resolved
            return told
    return None


def settled_for_groups(estate: Estate) -> ResolvedWorker | None:
    """What its groups were told; None if no leader of theirs answers."""
    asked = []
    for remains in find(estate.namespace).get(estate.version, Found()).groups.values():
        with contextlib.suppress(ValueError, KeyError):  # its leader has died
            asked.append(actor_of(estate.namespace, remains.ranks[0]).told.remote())
    deadline = time.monotonic() + ASK_TIMEOUT_S
    while asked and (left_s := deadline - time.monotonic()) > 0:
        answered, asked = ray.wait(asked, num_returns=1, timeout=left_s)
        with contextlib.suppress(ray.exceptions.RayError):
            for answer in answered:
                told: ResolvedWorker = ray.get(answer)
                return told
    return None


def take_over(owner: Owner, scheduler: SchedulerKeeper, new_handle: NewHandle) -> Adopted:
    """What there is of the estate goes on. Only a scheduler knows what the groups are doing; without it those that run wait for
    another one, and nobody is running empty or expected.

    Errors: EngineError if a scheduler that was taken over does not answer any more.
    """
    namespace = owner.estate.namespace
    found = find(namespace).get(owner.estate.version, Found())
    epochs = {group: epoch + 1 for group, epoch in sorted(found.groups)}
    handover = _adopt_scheduler(found, namespace, scheduler)
    if handover is None:
        return _take_over_groups(found, epochs, namespace, scheduler, new_handle)
    epochs |= {group: max(epoch + 1, epochs.get(group, 0)) for group, epoch in handover.epochs.items()}
    status: ClusterStatus = scheduler.call("status")
    groups = {group.group: group for group in (status.engine.groups if status.engine is not None else ())}
    adopted = Adopted(None, epochs, awaited=[name for name, group in groups.items() if not group.up])
    up = {name for name, group in groups.items() if group.up}
    waiting = _waiting({key: remains for key, remains in found.groups.items() if key[0] not in up}, namespace)
    for (name, started), remains in sorted(found.groups.items(), reverse=True):  # of each group the latest epoch first
        handle, said = None, waiting.get((name, started))
        if adopted.has(name):
            pass  # a later epoch of it
        elif name in up:
            handle = _adopt_group(groups[name], remains, new_handle)
        elif said is not None and said.token in ("", handover.token):
            handle = _adopted(new_handle(name, max(said.epoch, started)), remains, said)
        if handle is not None:
            adopted.keep(handle)
        else:
            end_group(namespace, remains)
    adopted.leaving = [handle.group for handle in adopted.groups if handle.group in up and groups[handle.group].draining]
    return adopted


def _adopt_scheduler(found: Found, namespace: str, scheduler: SchedulerKeeper) -> Handover | None:
    for life, name in sorted(found.schedulers.items(), reverse=True):
        with contextlib.suppress(ValueError):  # it has died meanwhile
            if (handover := scheduler.adopt(actor_of(namespace, name), life)) is not None:
                return handover
    return None


def _take_over_groups(
    found: Found, epochs: dict[int, int], namespace: str, scheduler: SchedulerKeeper, new_handle: NewHandle
) -> Adopted:
    """Without a scheduler; one that does not answer ends."""
    end(namespace, Found(found.schedulers))
    adopted, token = Adopted(max(found.schedulers, default=-1) + 1, epochs), ""
    waiting, deadline = _waiting(found.groups, namespace), time.monotonic() + SECRET_TIMEOUT_S
    while SILENT in waiting.values() and not any(said.token for said in waiting.values()) and time.monotonic() < deadline:
        time.sleep(AGAIN_S)
        silent = {key: found.groups[key] for key, said in waiting.items() if said is SILENT}
        waiting = {key: said for key, said in waiting.items() if said is not SILENT} | _waiting(silent, namespace)
    for (name, started), remains in sorted(found.groups.items(), reverse=True):  # of each group the latest epoch first
        handle, said = None, waiting.get((name, started))
        if said is not None and said.token in ("", token or said.token) and not adopted.has(name):
            handle = _adopted(new_handle(name, max(said.epoch, started)), remains, said)
            token = token or said.token
        if handle is not None:
            adopted.keep(handle)
        else:
            end_group(namespace, remains)
    if token:
        scheduler.trust(token)
    return adopted


def _waiting(groups: Mapping[tuple[int, int], Remains], namespace: str) -> dict[tuple[int, int], GroupHandover]:
    """Those of the groups that no scheduler has whose loops run or have yet to begin, as far as their leaders answer; `SILENT`
    for one that does not, and has not died: it compiles, or is in a long step."""
    asked = {}
    for key, remains in groups.items():
        with contextlib.suppress(ValueError, KeyError):  # its leader has died
            asked[actor_of(namespace, remains.ranks[0]).handover.remote()] = key
    answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=ASK_TIMEOUT_S) if asked else ([], [])
    told = dict.fromkeys(asked.values(), SILENT)
    for answer in answered:
        try:
            said = ray.get(answer)
        except ray.exceptions.ActorUnavailableError:  # the connection to it was cut
            continue
        except ray.exceptions.RayError:
            said = None
        if said is None:
            del told[asked[answer]]
        else:
            told[asked[answer]] = said
    return told


def _adopt_group(serving: GroupStats, remains: Remains, new_handle: NewHandle) -> GroupHandle | None:
    """None: that is another epoch of it, or not all of it is there."""
    if remains.epoch > serving.epoch:
        return None
    return _adopted(new_handle(serving.group, serving.epoch), remains)


def _adopted(handle: GroupHandle, remains: Remains, waiting: GroupHandover | None = None) -> GroupHandle | None:
    """waiting: what it says that no scheduler has."""
    try:
        if waiting is SILENT:
            handle.adopt_silent(remains)
        elif waiting is not None and not waiting.token:
            handle.adopt_begun(remains)
        else:
            handle.adopt(remains, waits=waiting is not None)
    except ValueError as error:
        logger.warning("group %d is not taken over: %s", handle.group, error)
        return None
    return handle
