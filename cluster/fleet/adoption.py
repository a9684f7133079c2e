"""Takes over what the owner of an estate has left when it died: its scheduler and its groups, as they run. Ends the rest.

Imports `estate`, `group` and `scheduler_keeper`. A `Fleet` keeps what it is handed from here on.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.fleet.estate import Found, Owner, Remains, actor_of, end_all, end_group, find
from cluster.fleet.group import GroupHandle
from cluster.fleet.scheduler_keeper import SchedulerKeeper
from scheduler.server.actor import Standing
from scheduler.server.stats import ClusterStatus, GroupStats

logger = logging.getLogger(__name__)

NewHandle = Callable[[int, int], GroupHandle]
"""Group and epoch -> a handle that has not been started."""


@dataclass(slots=True)
class Adopted:
    """next_life: of the scheduler, if none was there to be taken over; None: it lives. epochs: the next of each group.
    groups: those that run. leaving: which of them were running empty. awaited: those that requests wait for, and nobody starts.
    """

    next_life: int | None = 0
    epochs: dict[int, int] = field(default_factory=dict)
    groups: list[GroupHandle] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    awaited: list[int] = field(default_factory=list)


def take_over(owner: Owner, scheduler: SchedulerKeeper, version: str, new_handle: NewHandle) -> Adopted:
    """What is as the owner's configuration says goes on: the scheduler by its `version`, groups by the owner's. Without the
    scheduler nothing does: only it knows what the groups are doing.

    Errors: EngineError if a scheduler that was taken over does not answer any more.
    """
    namespace = owner.estate.namespace
    found = find(namespace)
    epochs = {group: epoch + 1 for group, epoch in sorted(found.groups)}
    standing = _adopt_scheduler(found, namespace, scheduler, version)
    if standing is None:
        end_all(namespace)
        return Adopted(found.schedulers[-1][0] + 1 if found.schedulers else 0, epochs)
    epochs |= {group: max(epoch + 1, epochs.get(group, 0)) for group, epoch in standing.epochs.items()}
    status: ClusterStatus = scheduler.call("status")
    groups = status.engine.groups if status.engine is not None else ()
    adopted = Adopted(None, epochs, awaited=[group.group for group in groups if not group.up])
    for name in {group for group, _ in found.groups}:
        lives = sorted((each for (group, _), each in found.groups.items() if group == name), key=lambda each: each.epoch)
        serving = next((group for group in groups if group.group == name and group.up), None)
        handle = _adopt_group(serving, lives[-1], owner, new_handle) if serving is not None else None
        if handle is not None:
            adopted.groups.append(handle)
            lives.pop()
        for each in lives:
            end_group(namespace, each)
    taken = {handle.group for handle in adopted.groups}
    adopted.leaving = [group.group for group in groups if group.draining and group.group in taken]
    return adopted


def _adopt_scheduler(found: Found, namespace: str, scheduler: SchedulerKeeper, version: str) -> Standing | None:
    for life, told, name in reversed(found.schedulers):
        if told != version:
            continue
        try:
            actor = actor_of(namespace, name)
        except ValueError:  # it has died meanwhile
            continue
        if (standing := scheduler.adopt(actor, life)) is not None:
            return standing
    return None


def _adopt_group(serving: GroupStats, remains: Remains, owner: Owner, new_handle: NewHandle) -> GroupHandle | None:
    """None: it is another group than the scheduler's, or none of ours, or not all of it is there."""
    if remains.version != owner.version or remains.epoch > serving.epoch:
        return None
    handle = new_handle(serving.group, serving.epoch)
    try:
        handle.adopt(remains)
    except ValueError as error:
        logger.warning("group %d is not taken over: %s", serving.group, error)
        return None
    return handle
